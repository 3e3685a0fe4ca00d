"""Sources that read files: Text, Jsonl, Csv, Parquet, and their base class FileSource.

Paths are files, globs or fsspec URLs. Files are decompressed by extension: .gz, .bz2, .xz, .zst,
and .zip with one file.
"""

import abc
import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from lm.data import compression, files
from lm.data.sources import Source, positional
from lm.data.unicode import check_encoding
from lm.errors import UserError, nearest

# Characters: a longer text file becomes several documents, so that memory stays bounded.
PART = 1 << 26


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
        if not all(isinstance(path, str) for path in paths):
            raise UserError(f"data.path={self.path!r} must be text or a tuple of texts.")
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
        check_encoding("data.encoding", self.encoding)


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
        for where, record in json_records(path, self.encoding):
            yield text_of(record, self.field, where)


def json_records(path: str, encoding: str = "utf-8") -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, JSON object) of each line; of a .json file, of each element of its list."""
    with files.reading(path) as file:
        if compression.extension(path) == ".json":
            content = _json("".join(files.decoded(file, path, encoding)), path)
            if not isinstance(content, list):
                raise UserError(f"{path} holds {type(content).__name__}, not a list of objects.")
            values = ((f"{path}, element {n}", each) for n, each in enumerate(content, start=1))
        else:
            lines = enumerate(files.lines(file, path, encoding), start=1)
            numbered = ((f"{path}, line {n}", line) for n, line in lines if not line.isspace())
            values = ((where, _json(line, where)) for where, line in numbered)
        for where, value in values:
            if not isinstance(value, dict):
                raise UserError(f"{where} holds {type(value).__name__}, not a JSON object.")
            yield where, value


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line, parse_int=_number, object_pairs_hook=lambda p: _object(p, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg} at column {error.colno}).") from None
    except RecursionError:
        raise UserError(f"{where} is JSON with too many levels of brackets.") from None


def _object(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where} has the field {twice!r} twice; keep one of them.")
    return values


def _number(digits: str) -> int | float:
    """Python refuses to convert integers of more than 4,300 digits."""
    return int(digits) if len(digits) < 1_000 else float(digits)


@dataclass(frozen=True, kw_only=True)
class Csv(_Encoded):
    """Comma-separated files with a header line, whose column `field` is the text.

    A field that begins with `quote` ends at the next single `quote`, and may contain delimiters and
    line ends. With quote=None quotes are letters like any other.
    """

    field: str = "text"
    delimiter: str = ","
    quote: str | None = '"'

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("delimiter", self.delimiter), ("quote", self.quote)):
            if value is not None and (len(value) != 1 or value in "\r\n"):
                raise UserError(f"data.{name}={value!r} must be one character of a line.")
        if self.delimiter == self.quote:
            raise UserError(f"data.delimiter={self.delimiter!r} must differ from data.quote.")

    def read_file(self, path: str) -> Iterator[str]:
        with files.reading(path) as file:
            lines = files.lines(file, path, self.encoding)
            rows = self._rows(lines, path)
            names = next(rows, [])
            check_field(self.field, names, path)
            column = names.index(self.field)
            for row in rows:
                yield row[column]

    def _rows(self, lines: Iterator[str], path: str) -> Iterator[list[str]]:
        """The fields of the header and of each row that is not blank, as many as in the header."""
        csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
        rows = csv.reader(
            lines,
            delimiter=self.delimiter,
            quotechar=self.quote,
            quoting=csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            strict=True,  # nothing but a delimiter or a line end after a closing quote
        )
        hint = " If quotes are letters in this file, set quote=None." if self.quote else ""
        columns, line = 0, 1  # the line at which the row begins
        try:
            for row in rows:
                columns = columns or len(row)
                if row and len(row) != columns:
                    several = rows.line_num > line
                    where = f"{line} to {rows.line_num}, within quotes," if several else line
                    counts = f"has {len(row)} of {columns} columns"
                    raise UserError(f"{path}, line {where} {counts}.{hint if several else ''}")
                if row:
                    yield row
                line = rows.line_num + 1
        except csv.Error as error:
            reason = f"{error}.{hint}"
            if "new-line character" in reason:
                reason = "a line ends in a lone carriage return; convert the file."
            raise UserError(f"{path}, line {line}: {reason}") from None


@dataclass(frozen=True, kw_only=True)
class Parquet(FileSource):
    """Parquet files whose column `field` is the text, read by row group. Nulls are skipped."""

    field: str = "text"

    def size(self) -> int | None:
        return None  # only one column is read, and it is compressed

    def read_file(self, path: str) -> Iterator[str]:
        with files.reading(path) as file:
            number = 0
            for column in _columns(file, self.field, path):
                for value in column:
                    number += 1
                    where = f"{path}, row {number}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        raise UserError(
                            f"{where}: byte {error.start} ({error.object[error.start]:#04x}) is "
                            f"not utf-8; write column {self.field!r} as UTF-8."
                        ) from None
                    yield text_of({self.field: text}, self.field, where)


def _columns(file: BinaryIO, field: str, path: str) -> Iterator[Any]:
    """The column `field` of a Parquet file as pyarrow arrays."""
    import pyarrow
    import pyarrow.parquet

    try:
        if not file.seekable():  # a compressed file; Parquet needs random access
            file = io.BytesIO(file.read())
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        check_field(field, table.schema_arrow.names, path)
        type_ = table.schema_arrow.field(field).type
        type_ = getattr(type_, "value_type", type_)  # of a dictionary
        if str(type_) not in ("string", "large_string", "string_view", "null"):
            raise UserError(f"{path}: field {field!r} holds {type_}, not text.")
        for rows in table.iter_batches(batch_size=512, columns=[field]):
            yield rows.column(rows.schema.get_field_index(field))
    except (pyarrow.ArrowException, OSError, MemoryError, OverflowError, UnicodeError) as error:
        raise UserError(
            f"{path} is not a complete Parquet file ({error}); fetch or write it again."
        ) from None


def of_path(path: str) -> FileSource:
    """The source of a file or glob by its extension: .jsonl, .csv, .tsv and .parquet, compressed or
    not, with the text in the field "text"; plain text for any other."""
    kind = compression.extension(path)
    if kind == ".tsv":
        return Csv(path=path, delimiter="\t")
    return {".jsonl": Jsonl, ".csv": Csv, ".parquet": Parquet}.get(kind, Text)(path=path)


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
    """Raises UserError, with the nearest name, unless exactly one of `known` is `field`."""
    if field not in known:
        raise UserError(f"{where} has no field {field!r} (data.field).{nearest(field, known)}")
    if known.count(field) > 1:
        raise UserError(f"{where} has {known.count(field)} fields {field!r}; rename one of them.")
