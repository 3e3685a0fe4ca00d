"""Whatever bytes a file holds, a source yields documents, in the right number, or raises one
UserError that names the file."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import tarfile
import time
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made_up_corpus import documents

from lm import data
from lm.data import files
from lm.errors import UserError

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
# tmp_path is shared by the examples of a test, which overwrite one file.
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
TEXTS = list(documents(20))
# Text without half surrogate pairs, which no file in UTF-8 holds.
LETTERS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def read(source):
    return list(source.documents())


def error(source):
    with pytest.raises(UserError) as caught:
        read(source)
    return str(caught.value)


def write(path, content):
    path.write_bytes(content)
    return str(path)


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def table(texts, **options):
    file = io.StringIO(newline="")
    rows = csv.writer(file, **options)
    rows.writerows([("id", "text"), *enumerate(texts)])
    return file.getvalue().encode()


def parquet(texts):
    file = io.BytesIO()
    columns = {"id": list(range(len(texts))), "text": list(texts)}
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=5)
    return file.getvalue()


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(f"{name}.txt", text)
    return file.getvalue()


def tarred(**members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return file.getvalue()


FORMATS = {
    "jsonl": (data.Jsonl, jsonl),
    "csv": (data.Csv, table),
    "parquet": (data.Parquet, parquet),
}


# Arbitrary bytes


@pytest.mark.parametrize("source", [data.Text, data.Jsonl, data.Csv, data.Parquet])
@pytest.mark.parametrize("extension", ["", *COMPRESS, ".zip"])
@SHARED
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes_are_documents_or_one_error(source, extension, content, tmp_path):
    path = write(tmp_path / f"x.txt{extension}", content)
    with contextlib.suppress(UserError):
        assert all(text.encode() for text in read(source(path)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("extension", ["", *COMPRESS])
@SHARED
@given(
    position=st.floats(0, 1, exclude_max=True),
    removed=st.integers(0, 20),
    added=st.binary(max_size=3),
)
def test_damaged_files_are_documents_or_one_error(
    name, extension, position, removed, added, tmp_path
):
    """Bytes are replaced, inserted or removed anywhere in a valid file."""
    source, encode = FORMATS[name]
    content = COMPRESS.get(extension, bytes)(encode(TEXTS))
    start = int(position * len(content))
    damaged = content[:start] + added + content[start + removed :]
    path = write(tmp_path / f"x.{name}{extension}", damaged)
    try:
        texts = read(source(path))
    except UserError as refused:
        assert path in str(refused)
    else:
        # Compressed text has a checksum; the header of a format may change without effect.
        assert not extension or name == "parquet" or texts == TEXTS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32", "utf-7", "shift_jis", "gb18030"])
@SHARED
@given(content=st.binary(max_size=50))
def test_arbitrary_bytes_in_any_encoding(encoding, content, tmp_path):
    path = write(tmp_path / "x.txt", content)
    with contextlib.suppress(UserError):
        read(data.Text(path, encoding=encoding))


# The right number of documents


@pytest.mark.parametrize("name", FORMATS)
@SHARED
@given(texts=st.lists(LETTERS, max_size=5))
@example(texts=['"', 'a "b"', "a,b", "\r\n", '""\n""'])
def test_every_row_is_one_document(name, texts, tmp_path):
    source, encode = FORMATS[name]
    assert read(source(write(tmp_path / f"x.{name}", encode(texts)))) == texts


@SHARED
@given(texts=st.lists(st.text('ab ",\t', min_size=1), max_size=5))
@example(texts=['"Never," she said', '"Not now', 'He called it "odd"', "The last"])
@example(texts=['"It began in May', "The second", "The third"])
def test_rows_whose_quotes_are_letters_are_refused_or_all_there(texts, tmp_path):
    """Written by a program that does not know quotes. Read with them, a row may be refused, but
    none disappears into another, unless a later row ends with a quote, which reads as one text of
    several lines."""
    texts = [text.replace("\t", "").rstrip('"') or "a" for text in texts]
    rows = [f"{i}\t{text}\n" for i, text in enumerate(texts)]
    path = write(tmp_path / "x.tsv", "".join(["id\ttext\n", *rows]).encode())
    assert read(data.Csv(path, delimiter="\t", quote=None)) == texts
    with contextlib.suppress(UserError):
        assert len(read(data.Csv(path, delimiter="\t"))) == len(texts)


def test_an_error_gives_the_line_where_the_quotes_begin(tmp_path):
    path = write(tmp_path / "x.csv", b'id,text\n1,one\n2,"It began in May\n3,three\n4,four\n')
    assert "x.csv, line 3: unexpected end of data. If quotes are letters" in error(data.Csv(path))
    path = write(tmp_path / "x.csv", b'id,text\n1,"one\n2,two"\n3,three\n4,"four\n5",5\n')
    assert "line 5 to 6, within quotes, has 3 of 2 columns" in error(data.Csv(path))
    path = write(tmp_path / "x.csv", b'id,text\n1,"one" and\n')
    assert "line 2: ',' expected after '\"'" in error(data.Csv(path))
    path = write(tmp_path / "x.csv", b"id,text\n1,one,and more\n")
    assert "line 2 has 3 of 2 columns." in error(data.Csv(path))
    path = write(tmp_path / "x.csv", b"text,text\n1,one\n")
    assert "has 2 fields 'text'; rename one of them" in error(data.Csv(path))


@pytest.mark.parametrize("quote", ["", "\n", ",", "''"])
def test_invalid_quotes_are_refused(quote):
    with pytest.raises(UserError, match=r"data\.(quote|delimiter)="):
        data.Csv("x.csv", quote=quote)


# Compressed files and archives


@pytest.mark.parametrize("extension", COMPRESS)
def test_a_file_cut_anywhere_is_refused(extension, tmp_path):
    """Also between and within the streams of a file that was compressed in parts."""
    parts = [COMPRESS[extension](jsonl(TEXTS[i : i + 2])) for i in (0, 2, 4)]
    whole = b"".join(parts)
    ends = {len(b"".join(parts[:n])) for n in (1, 2, 3)}
    assert read(data.Jsonl(write(tmp_path / f"x{extension}", whole))) == TEXTS[:6]
    for cut in range(0, len(whole), 7):
        if cut not in ends:
            path = write(tmp_path / f"x{extension}", whole[:cut])
            assert "is cut short or damaged" in error(data.Jsonl(path)), cut
    path = write(tmp_path / f"x{extension}", parts[0] + b"garbage" + parts[1])
    assert "is cut short or damaged" in error(data.Jsonl(path))


def test_a_zip_archive_must_hold_one_file(tmp_path):
    assert read(data.Text(write(tmp_path / "x.zip", zipped(a="one text")))) == ["one text"]
    path = write(tmp_path / "x.txt.zip", zipped(a="first", b="second"))
    assert "x.txt.zip holds 2 files; extract it" in error(data.Text(path))
    assert "holds 0 files" in error(data.Text(write(tmp_path / "x.zip", zipped())))
    whole = zipped(a="one text" * 99)
    for cut in range(0, len(whole), 5):
        error(data.Text(write(tmp_path / "x.zip", whole[:cut])))


@pytest.mark.parametrize("source", [data.Text, data.Jsonl, data.Csv])
def test_archives_and_compressed_data_are_not_read_as_text(source, tmp_path):
    archive = tarred(a="first", b="second")
    latin = {"encoding": "latin-1"}  # every byte is a character
    assert "holds a tar archive, not text" in error(source(write(tmp_path / "x.tar", archive)))
    for extension, compress in COMPRESS.items():
        path = write(tmp_path / f"x.tar{extension}", compress(archive))
        assert "holds a tar archive" in error(source(path, **latin))
        path = write(tmp_path / "x.txt", compress(b"text"))
        assert "data, not text; extract it, or give it the extension" in error(
            source(path, **latin)
        )
    assert "a zip archive" in error(source(write(tmp_path / "x.txt", zipped(a="b")), **latin))
    assert "a Parquet file" in error(source(write(tmp_path / "x.txt", parquet(TEXTS)), **latin))


# Values that parsers of the formats do not accept


def test_json_with_long_numbers_and_deep_brackets(tmp_path):
    line = f'{{"n": {"7" * 5_000}, "text": "here"}}\n'.encode()
    assert read(data.Jsonl(write(tmp_path / "x.jsonl", line))) == ["here"]
    line = b'{"text": ' + b"7" * 5_000 + b"}\n"
    assert "line 1: field 'text' holds float" in error(
        data.Jsonl(write(tmp_path / "x.jsonl", line))
    )
    line = b'{"text": ' + b"[" * 200_000 + b"\n"
    assert "line 1 is " in error(data.Jsonl(write(tmp_path / "x.jsonl", line)))


def test_a_parquet_column_that_is_not_utf8(tmp_path):
    column = pyarrow.array([b"one", None, b"caf\xe9"]).cast(pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, column.buffers())
    path = str(tmp_path / "x.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert "x.parquet, row 3: byte 3 (0xe9) is not utf-8" in error(data.Parquet(path))
    for value in (7, b"bytes", ["list"], {"a": "struct"}):
        pyarrow.parquet.write_table(pyarrow.table({"text": [value]}), path)
        assert "field 'text' holds " in error(data.Parquet(path))


@pytest.mark.parametrize("encoding", ["hex", "rot13", "base64", "zlib", "idna", "punycode", "a\0b"])
def test_codecs_that_are_no_text_encoding_are_refused(encoding):
    with pytest.raises(UserError, match=r"data\.encoding="):
        data.Text("x.txt", encoding=encoding)


def test_half_surrogate_pairs_become_replacement_characters():
    texts = ("a\ud83d b", "\ud83d\ude42", "\udce9")
    assert read(data.Documents(texts)) == ["a\ufffd b", "\U0001f642", "\ufffd"]
    assert data.Documents(texts).size() == len("a\ufffd b\U0001f642\ufffd".encode())


def test_reading_a_long_line_is_not_quadratic(tmp_path, monkeypatch):
    """A line of 16,384 blocks takes about as long as its bytes in short lines. Quadratic time would
    be hundreds of times as long; a factor of 30 leaves room for a busy machine."""
    monkeypatch.setattr(files, "BLOCK", 1 << 10)
    size = 1 << 24

    def seconds(content):
        path = write(tmp_path / "x.jsonl", content)
        start = time.process_time()
        with files.reading(path) as file:
            assert sum(map(len, files.lines(file, path, "utf-8"))) == size
        return time.process_time() - start

    short = min(seconds((b"a" * 1023 + b"\n") * (size >> 10)) for _ in range(3))
    assert seconds(b"a" * size) < 30 * short


# Found by trying to break the readers


@pytest.mark.parametrize("extension", COMPRESS)
def test_a_compressed_file_of_zeros_is_damaged(extension, tmp_path):
    path = write(tmp_path / f"x{extension}", b"\0" * 5_000)
    assert "is cut short or damaged" in error(data.Text(path))


def test_every_match_of_a_glob_is_read_or_refused(tmp_path):
    write(tmp_path / "a.txt", b"text")
    (tmp_path / "b.txt").mkdir()
    assert read(data.Text(str(tmp_path / "*.txt"))) == ["text"]
    (tmp_path / "c.txt").symlink_to(tmp_path / "nothing")
    assert "c.txt is no regular file" in error(data.Text(str(tmp_path / "*.txt")))
    (tmp_path / "c.txt").unlink()
    os.mkfifo(tmp_path / "d.txt")
    for path in ("*.txt", "d.txt"):
        assert "d.txt is no regular file" in error(data.Text(str(tmp_path / path)))


@pytest.mark.parametrize("path", ["a\0b", "d/**a", "foo://x", "zip://a::nothing.zip", "data:,x"])
def test_paths_that_no_filesystem_has(path):
    assert path.split("\0")[0] in error(data.Text(path))


def test_names_that_are_not_utf8_and_links_in_a_circle(tmp_path):
    path = write(tmp_path / os.fsdecode(b"\xfe.txt"), b"text")
    assert read(data.Text(path)) == ["text"] and data.Text(path).fingerprint()
    assert read(data.Text(write(tmp_path / "a::b.txt", b"text"))) == ["text"]
    (tmp_path / "x").symlink_to(tmp_path / "y")
    (tmp_path / "y").symlink_to(tmp_path / "x")
    assert "There is no file" in error(data.Text(str(tmp_path / "nothing.txt")))


def test_text_that_begins_like_a_format_is_text(tmp_path):
    for text in ("BZh is a word", "PAR1 is a gene", "PK"):
        assert read(data.Text(write(tmp_path / "x.txt", text.encode()))) == [text]


def test_a_json_field_twice_and_zips_behind_something(tmp_path):
    path = write(tmp_path / "x.jsonl", b'{"text": "a", "text": "b"}\n')
    assert "line 1 has the field 'text' twice" in error(data.Jsonl(path))
    two = zipped(a="hello") + zipped(b="world")
    assert "holds something before" in error(data.Text(write(tmp_path / "x.zip", two)))


def test_advice_fits_the_file(tmp_path):
    path = write(tmp_path / "x.txt", "text".encode("utf-16"))
    assert "encoding='utf-16'" in error(data.Text(path))
    path = write(tmp_path / "x.csv", b"id,text\r1,one\r")
    assert "lone carriage return; convert the file" in error(data.Csv(path))


def test_a_parquet_column_beside_a_struct_of_that_name(tmp_path):
    path = str(tmp_path / "x.parquet")
    columns = {"d": [{"text": 1}], "d.text": ["one"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert read(data.Parquet(path, field="d.text")) == ["one"]


@pytest.mark.parametrize("texts", ["hello", None, (b"x",), (5,)])
def test_documents_must_be_texts(texts):
    with pytest.raises(UserError, match=r"data\.texts="):
        data.Documents(texts)


@pytest.mark.parametrize(
    "weights", [{"a": 1e308, "b": 1e308}, ((0.5, {"a": 1}),), ({"a": 1},), ((0, {"a": 1}), (5,))]
)
def test_weights_that_cannot_be_used(weights):
    sources = {"a": data.Documents(("x",)), "b": data.Documents(("y",))}
    with pytest.raises(UserError, match=r"data\.weights"):
        data.Mixture(sources=sources, weights=weights)


@pytest.mark.parametrize("source", ["text", None, data.Shards("x")])
def test_a_mixture_is_of_sources(source):
    with pytest.raises(UserError, match=r"data\.sources\.a must be a source"):
        data.Mixture(sources={"a": source})


@pytest.mark.parametrize("content", ["5", "[1]", '{"a": 1}', '{"recipe": 5}', "{"])
def test_a_damaged_manifest_is_named(content, tmp_path, tokenizer_config):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        data.prepare(data.Documents(tuple(TEXTS)), tokenizer_config, tmp_path)


def test_a_wrong_field_is_found_before_another_source_is_read(tmp_path, tokenizer_config):
    class Counted(data.Documents):
        def read(self):
            reads.append(1)
            yield "first"
            raise AssertionError("reads on")

    reads = []
    path = write(tmp_path / "x.jsonl", jsonl(TEXTS))
    sources = {"a": Counted(tuple(TEXTS)), "b": data.Jsonl(path, field="txt")}
    with pytest.raises(UserError, match="no field 'txt'"):
        data.prepare(data.Mixture(sources=sources), tokenizer_config, tmp_path / "prepared")
