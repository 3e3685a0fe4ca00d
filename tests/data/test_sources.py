"""Every format yields the same documents, and every unreadable file raises one error message."""

import builtins
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
from lm.data.split import scan
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
def test_formats_yield_the_same_documents(name, tmp_path):
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
def test_compressed_files_are_read(module, ending, tmp_path):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(module.compress(TEXTS[0].encode()))
    assert read(data.Text(str(path))) == [TEXTS[0]]
    records = tmp_path / f"a.jsonl{ending}"
    records.write_bytes(module.compress(json.dumps({"text": TEXTS[1]}).encode()))
    assert read(data.Jsonl(str(records))) == [TEXTS[1]]


def test_files_at_urls_are_read():
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/corpus/{i}.txt": text.encode() for i, text in enumerate(TEXTS)})
    assert read(data.Text("memory://corpus/*.txt")) == TEXTS
    with pytest.raises(UserError, match="matches no file"):
        read(data.Text("memory://elsewhere/*.txt"))


def test_a_long_text_file_is_split_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("lm.data.file_sources.PART", 500)
    monkeypatch.setattr(files, "BLOCK", 64)
    path = tmp_path / "long.txt"
    path.write_bytes("".join(TEXTS * 3).encode())
    parts = read(data.Text(str(path)))
    assert len(parts) > 3
    assert "".join(parts) == "".join(TEXTS * 3)
    assert all(part.endswith("\n") for part in parts[:-1])


def test_characters_that_span_blocks_are_decoded(tmp_path, monkeypatch):
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


def test_the_error_gives_the_file_offset_of_an_invalid_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 10)
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() * 50 + b"\xff")
    with pytest.raises(UserError, match="byte 100 "):
        read(data.Text(str(path)))


def test_empty_texts_and_nulls_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n\n{"text": null}\n{"text": "x"}')
    assert read(data.Jsonl(str(path))) == ["x"]


def test_an_unpaired_surrogate_becomes_a_replacement_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert read(data.Jsonl(str(path))) == ["a\ufffdb 😀"]


def error(source):
    with pytest.raises(UserError) as caught:
        read(source)
    return str(caught.value)


def test_missing_files_are_errors(tmp_path):
    (tmp_path / "book.txt").write_text("x")
    message = error(data.Text(str(tmp_path / "bok.txt")))
    assert "bok.txt" in message and "Did you mean 'book.txt'?" in message
    assert "matches no file" in error(data.Text(str(tmp_path / "*.md")))
    assert "is a folder" in error(data.Text(str(tmp_path)))
    assert "cannot be opened" in error(data.Text("nosuch://x/y.txt"))


def test_a_folder_is_not_suggested_for_a_file(tmp_path):
    (tmp_path / "notes").mkdir()
    message = error(data.Text(str(tmp_path / "notes.txt")))
    assert message.endswith("notes.txt'.")


@pytest.mark.parametrize("path", ["", (), ("a.txt", "")])
def test_an_empty_path_names_the_field(path):
    with pytest.raises(UserError, match=r"^data\.path=.* names no file; set it, as in data\.path="):
        data.Text(path)
    with pytest.raises(UserError, match=r"^tokenizer\.path='' names no file"):
        data.TokenizerFile(path="")


@pytest.mark.parametrize("module, ending", [(gzip, ".gz"), (lzma, ".xz"), (None, "")])
def test_progress_counts_bytes_on_disk(module, ending, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 1 << 12)
    path = tmp_path / f"a.jsonl{ending}"
    write_jsonl(path, documents(3_000))  # compressed, several of gzip's reads of 128 KiB
    if module:
        path.write_bytes(module.compress(path.read_bytes()))
    bars = []

    class Bar:
        def __init__(self, description, total, unit):
            self.total, self.unit, self.steps = total, unit, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def advance(self, amount):
            self.steps.append(amount)

    scan("x", data.Jsonl(str(path)), None, Bar)
    (bar,) = bars
    assert bar.unit == "B" and bar.total == path.stat().st_size == sum(bar.steps)
    assert len(bar.steps) > 2


def test_unreadable_files_are_errors(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")

    def forbidden(*_, **__):  # file permissions do not apply to root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", forbidden)
    assert "a.txt cannot be read: permission denied" in error(data.Text(str(path)))


def test_truncated_compressed_files_are_errors(tmp_path):
    whole = gzip.compress(os.urandom(10_000).hex().encode())
    for name, content in (("cut", whole[:5_000]), ("other", b"not gzip at all")):
        path = tmp_path / f"{name}.txt.gz"
        path.write_bytes(content)
        assert f"{name}.txt.gz is cut short or damaged" in error(data.Text(str(path)))


def test_errors_give_the_line_of_an_invalid_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"txt": "y"}\n')
    assert "line 2 has no field 'text'" in error(data.Jsonl(str(path)))
    assert "Did you mean 'text'?" in error(data.Jsonl(str(path), field="tex"))
    path.write_text('{"text": "x"}\n{"text": "y"\n')
    assert "line 2 is not JSON" in error(data.Jsonl(str(path)))
    path.write_text('{"text": 3}\n')
    assert "line 1: field 'text' holds int, not text" in error(data.Jsonl(str(path)))
    path.write_text("[1]\n")
    assert "line 1 holds list, not a JSON object" in error(data.Jsonl(str(path)))


def test_invalid_tables_are_errors(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,x\n2\n")
    assert "line 3 has 1 of 2 columns" in error(data.Csv(str(path)))
    assert "Did you mean 'text'?" in error(data.Csv(str(path), field="txt"))
    table = tmp_path / "a.parquet"
    write_parquet(table, TEXTS)
    assert "Did you mean 'text'?" in error(data.Parquet(str(table), field="txt"))
    table.write_bytes(table.read_bytes()[:-20])
    assert "is not a complete Parquet file" in error(data.Parquet(str(table)))


def test_an_invalid_held_out_fraction_is_an_error():
    for fraction in (-0.1, 1.0):
        with pytest.raises(UserError, match="held_out"):
            data.Documents(("x",), held_out=fraction)


def test_the_recipe_depends_on_content_and_not_on_location(tmp_path):
    paths = []
    for folder in ("original", "moved"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "a.txt")
        paths[-1].write_text("x")
        os.utime(paths[-1], (1_000, 1_000))
    original, moved = (data.Text(str(path)) for path in paths)
    assert original.recipe() == moved.recipe()
    paths[1].write_text("y")
    assert original.recipe() != moved.recipe()
    assert original.recipe() != data.Text(str(paths[0]), held_out=0.1).recipe()


def test_the_standard_library_excludes_its_tests_and_site_packages():
    source = data.StandardLibrary()
    paths = source._paths()
    assert any(path.endswith("json/decoder.py") for path in paths)
    assert not any("/test/" in path or "/site-packages/" in path for path in paths)
    assert source.recipe() == data.StandardLibrary().recipe()
    assert source.size() > 5_000_000
