"""Every format gives the same documents, and every bad file one sentence."""

import bz2
import csv
import gzip
import json
import lzma
import os

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from made_up_corpus import documents

from lm import data
from lm.data import files
from lm.errors import UserError

TEXTS = [*documents(5), 'a "quoted", text\r\nwith\ttabs\r\n', "\x00 and \x85 and \u2028 stay"]


def read(source):
    return list(source.documents())


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))


def write_csv(path, texts):
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "text"])
        rows.writerows([[1, text] for text in texts])


def write_parquet(path, texts):
    table = pyarrow.table({"id": [1] * len(texts), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


FORMATS = {
    "jsonl": (data.Jsonl, write_jsonl),
    "csv": (data.Csv, write_csv),
    "parquet": (data.Parquet, write_parquet),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_give_the_same_documents(name, tmp_path):
    source, write = FORMATS[name]
    path = tmp_path / f"x.{name}"
    write(path, TEXTS)
    assert read(source(path=str(path))) == TEXTS


def test_text_is_one_document_per_file_in_sorted_order(tmp_path):
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt").write_bytes(text.encode())
    assert read(data.Text(str(tmp_path / "*.txt"))) == TEXTS
    assert read(data.Text(path=(str(tmp_path / "1.txt"), str(tmp_path / "0.txt")))) == [
        TEXTS[1],
        TEXTS[0],
    ]


@pytest.mark.parametrize("module, ending", [(gzip, ".gz"), (bz2, ".bz2"), (lzma, ".xz")])
def test_compressed_files(module, ending, tmp_path):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(module.compress(TEXTS[0].encode()))
    assert read(data.Text(str(path))) == [TEXTS[0]]
    records = tmp_path / f"a.jsonl{ending}"
    records.write_bytes(module.compress(json.dumps({"text": TEXTS[1]}).encode()))
    assert read(data.Jsonl(str(records))) == [TEXTS[1]]


def test_urls():
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/corpus/{i}.txt": text.encode() for i, text in enumerate(TEXTS)})
    assert read(data.Text("memory://corpus/*.txt")) == TEXTS
    with pytest.raises(UserError, match="matches no file"):
        read(data.Text("memory://elsewhere/*.txt"))


def test_a_long_text_file_is_given_in_parts_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("lm.data.sources.PART", 500)
    monkeypatch.setattr(files, "BLOCK", 64)
    path = tmp_path / "long.txt"
    path.write_bytes("".join(TEXTS * 3).encode())
    parts = read(data.Text(str(path)))
    assert len(parts) > 3
    assert "".join(parts) == "".join(TEXTS * 3)
    assert all(part.endswith("\n") for part in parts[:-1])


def test_characters_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 3)
    path = tmp_path / "a.txt"
    path.write_bytes(("\ufeff" + TEXTS[0]).encode())
    assert "".join(read(data.Text(str(path)))) == TEXTS[0]


def test_other_encodings(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("déjà vu".encode("latin-1"))
    assert read(data.Text(str(path), encoding="latin-1")) == ["déjà vu"]
    with pytest.raises(
        UserError, match=r"a\.txt: byte 1 \(0xe9\) is not utf-8.*encoding='latin-1'"
    ):
        read(data.Text(str(path)))
    with pytest.raises(UserError, match="Did you mean 'latin-1'"):
        data.Text(str(path), encoding="latn-1")


def test_the_offset_of_a_bad_byte_is_that_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 10)
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() * 50 + b"\xff")
    with pytest.raises(UserError, match="byte 100 "):
        read(data.Text(str(path)))


def test_empty_documents_and_nulls_are_no_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n\n{"text": null}\n{"text": "x"}')
    assert read(data.Jsonl(str(path))) == ["x"]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert read(data.Jsonl(str(path))) == ["a\ufffdb 😀"]


def refusal(source):
    with pytest.raises(UserError) as caught:
        read(source)
    return str(caught.value)


def test_missing_files_are_refused(tmp_path):
    (tmp_path / "book.txt").write_text("x")
    sentence = refusal(data.Text(str(tmp_path / "bok.txt")))
    assert "bok.txt" in sentence and "Did you mean 'book.txt'?" in sentence
    assert "matches no file" in refusal(data.Text(str(tmp_path / "*.md")))
    assert "is a folder" in refusal(data.Text(str(tmp_path)))
    assert "cannot be opened" in refusal(data.Text("nosuch://x/y.txt"))


def test_unreadable_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")

    def forbidden(*_, **__):  # a mode of 0 would not keep a superuser out
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fsspec, "open", forbidden)
    assert "a.txt may not be read" in refusal(data.Text(str(path)))


def test_cut_off_compressed_files_are_refused(tmp_path):
    whole = gzip.compress(os.urandom(10_000).hex().encode())
    for name, content in (("cut", whole[:5_000]), ("other", b"not gzip at all")):
        path = tmp_path / f"{name}.txt.gz"
        path.write_bytes(content)
        assert f"{name}.txt.gz is cut short or damaged" in refusal(data.Text(str(path)))


def test_bad_records_are_refused_with_their_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"txt": "y"}\n')
    assert "line 2 has no field 'text'" in refusal(data.Jsonl(str(path)))
    assert "Did you mean 'text'?" in refusal(data.Jsonl(str(path), field="tex"))
    path.write_text('{"text": "x"}\n{"text": "y"\n')
    assert "line 2 is not JSON" in refusal(data.Jsonl(str(path)))
    path.write_text('{"text": 3}\n')
    assert "line 1: field 'text' holds int, not text" in refusal(data.Jsonl(str(path)))
    path.write_text("[1]\n")
    assert "line 1 holds list, not a JSON object" in refusal(data.Jsonl(str(path)))


def test_bad_tables_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,x\n2\n")
    assert "line 3 has 1 of 2 columns" in refusal(data.Csv(str(path)))
    assert "Did you mean 'text'?" in refusal(data.Csv(str(path), field="txt"))
    table = tmp_path / "a.parquet"
    write_parquet(table, TEXTS)
    assert "Did you mean 'text'?" in refusal(data.Parquet(str(table), field="txt"))
    table.write_bytes(table.read_bytes()[:-20])
    assert "is not a whole Parquet file" in refusal(data.Parquet(str(table)))


def test_shares_are_checked():
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match="held_out"):
            data.Documents(("x",), held_out=share)


def test_the_recipe_knows_the_content_and_not_the_place(tmp_path):
    paths = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "a.txt")
        paths[-1].write_text("x")
        os.utime(paths[-1], (1_000, 1_000))
    here, there = (data.Text(str(path)) for path in paths)
    assert here.recipe() == there.recipe()
    paths[1].write_text("y")
    assert here.recipe() != there.recipe()
    assert here.recipe() != data.Text(str(paths[0]), held_out=0.1).recipe()


def test_the_standard_library_has_source_and_no_tests():
    source = data.StandardLibrary()
    paths = source._paths()
    assert any(path.endswith("json/decoder.py") for path in paths)
    assert not any("/test/" in path or "/site-packages/" in path for path in paths)
    assert source.recipe() == data.StandardLibrary().recipe()
    assert source.size() > 5_000_000
