"""Sources that read files: Text, Jsonl, Csv, Parquet, and their base class FileSource.

Paths are files, globs or fsspec URLs; .gz .bz2 .xz .zst are decompressed by extension.
"""

import abc
import codecs
import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lm.data import files
from lm.data.sources import Source, positional
from lm.errors import UserError, check_name, nearest

# Characters: a longer text file becomes several documents, so that memory stays bounded.
PART = 1 << 26
_ENCODINGS = ("utf-8", "utf-16", "latin-1", "cp1252", "ascii")  # suggested for a misspelt one


@dataclass(frozen=True, kw_only=True)
class FileSource(Source):
    """Base class of sources that read files. A subclass implements `read_file`.

    `path` is a file, a glob ('books/**/*.txt'), an fsspec URL, or a tuple of them.
    """

    path: str | tuple[str, ...] = positional()

    _locations = ("path",)

    def __post_init__(self) -> None:
        super().__post_init__()
        paths = self.path if isinstance(self.path, tuple) else (self.path,)
        if not paths or "" in paths:
            raise UserError(
                f"data.path={self.path!r} names no file; set it, as in data.path='books/*.txt'."
            )

    @abc.abstractmethod
    def read_file(self, path: str) -> Iterator[str]:
        """The texts of one file. `lm.data.files.reading` opens it, local or at a URL."""

    def read(self) -> Iterator[str]:
        for file in files.find(self.path):
            yield from self.read_file(file.path)

    def fingerprint(self) -> str:
        return files.fingerprint(files.find(self.path))

    def size(self) -> int | None:
        """Bytes of the files on disk, compressed ones included."""
        sizes = [file.size for file in files.find(self.path)]
        return None if None in sizes else sum(sizes)


@dataclass(frozen=True, kw_only=True)
class _Encoded(FileSource):
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            check_name("data.encoding", self.encoding, _ENCODINGS)


@dataclass(frozen=True, kw_only=True)
class Text(_Encoded):
    """Plain text files, one document each. A file of more than 64 Mi characters becomes several
    documents, cut at line ends."""

    def read_file(self, path: str) -> Iterator[str]:
        with files.reading(path) as file:
            blocks, size = [], 0
            for block in files.decoded(file, path, self.encoding):
                blocks.append(block)
                size += len(block)
                if size >= PART:
                    text = "".join(blocks)
                    end = text.rfind("\n") + 1 or len(text)
                    yield text[:end]
                    blocks, size = [text[end:]], len(text) - end
            yield "".join(blocks)


@dataclass(frozen=True, kw_only=True)
class Jsonl(_Encoded):
    """Files with one JSON object per line, whose `field` is the text. Nulls and blank lines are
    skipped."""

    field: str = "text"

    def read_file(self, path: str) -> Iterator[str]:
        with files.reading(path) as file:
            for number, line in enumerate(files.lines(file, path, self.encoding), start=1):
                if line.isspace():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{where} is not JSON ({error.msg} at column {error.colno})."
                    ) from None
                if not isinstance(record, dict):
                    raise UserError(f"{where} holds {type(record).__name__}, not a JSON object.")
                yield _replace_surrogates(text_of(record, self.field, where))


@dataclass(frozen=True, kw_only=True)
class Csv(_Encoded):
    """Comma-separated files with a header line, whose column `field` is the text."""

    field: str = "text"
    delimiter: str = ","

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.delimiter) != 1:
            raise UserError(f"data.delimiter={self.delimiter!r} must be one character.")

    def read_file(self, path: str) -> Iterator[str]:
        csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
        with files.reading(path) as file:
            rows = csv.reader(files.lines(file, path, self.encoding), delimiter=self.delimiter)
            try:
                names = next(rows, [])
                check_field(self.field, names, path)
                column = names.index(self.field)
                for row in rows:
                    if len(row) > column:
                        yield row[column]
                    elif row:
                        where = f"{path}, line {rows.line_num}"
                        raise UserError(f"{where} has {len(row)} of {len(names)} columns.")
            except csv.Error as error:
                raise UserError(f"{path}, line {rows.line_num}: {error}.") from None


@dataclass(frozen=True, kw_only=True)
class Parquet(FileSource):
    """Parquet files whose column `field` is the text, read by row group. Nulls are skipped."""

    field: str = "text"

    def size(self) -> int | None:
        return None  # only one column is read, and it is compressed

    def read_file(self, path: str) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        with files.reading(path) as file:
            try:
                table = pyarrow.parquet.ParquetFile(file)
                check_field(self.field, table.schema_arrow.names, path)
                for rows in table.iter_batches(batch_size=512, columns=[self.field]):
                    for text in rows.column(0).to_pylist():
                        yield text_of({self.field: text}, self.field, path)
            except pyarrow.ArrowException as error:
                raise UserError(
                    f"{path} is not a complete Parquet file ({error}); fetch or write it again."
                ) from None


def text_of(record: Mapping[str, Any], field: str, where: str) -> str:
    """The text in a record's field; "" for null. Raises UserError, with `where`, for another type
    and for a missing field."""
    check_field(field, list(record), where)
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} holds {type(value).__name__}, not text.")
    return value


def check_field(field: str, known: list[str], where: str) -> None:
    """Raises UserError, with the nearest name, unless `field` is one of `known`."""
    if field not in known:
        raise UserError(f"{where} has no field {field!r} (data.field).{nearest(field, known)}")


def _replace_surrogates(text: str) -> str:
    # JSON can encode half of a surrogate pair, which is not a character and has no UTF-8 form.
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
