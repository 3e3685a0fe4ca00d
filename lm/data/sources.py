"""Where documents come from. A source is a declaration; `documents()` yields the texts, `recipe()`
says what they were made of.

Every source says which share of its documents is `held_out` from training, to be evaluated on.
"""

import abc
import codecs
import csv
import dataclasses
import hashlib
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lm.data import files, records
from lm.errors import UserError, check_name, nearest

log = logging.getLogger(__name__)

# Characters: a text file longer than this is given in parts, so that memory stays bounded.
PART = 1 << 26
_ENCODINGS = ("utf-8", "utf-16", "latin-1", "cp1252", "ascii")  # what a typo may have meant
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def _first() -> Any:
    # The one field that may be given without its name: data.Text("books/*.txt").
    return dataclasses.field(kw_only=False)


@dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """What all sources share. `held_out` is a share of the documents; 0 holds nothing out."""

    held_out: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise UserError(f"data.held_out={self.held_out!r} must be a share from 0 to below 1.")

    @property
    def label(self) -> str:
        """What the source is called when it is used alone, outside a Mixture."""
        return type(self).__name__.lower()

    def documents(self) -> Iterator[str]:
        """The texts, always in the same order; none is empty. Raises UserError for what cannot be
        read."""
        return (text for text in self._read() if text)

    def size(self) -> int | None:
        """Bytes of text to come, for a progress bar; None where that is not known before
        reading."""
        return None

    def recipe(self) -> dict[str, Any]:
        """The declaration without its places, and a fingerprint of what lies there."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("path", "texts")}
        return {"source": type(self).__name__, **fields, "fingerprint": self._fingerprint()}

    @abc.abstractmethod
    def _read(self) -> Iterator[str]:
        """The texts, empty ones included."""

    @abc.abstractmethod
    def _fingerprint(self) -> str:
        """Changes with what lies there."""


@dataclass(frozen=True, kw_only=True)
class _Files(Source):
    path: str | tuple[str, ...] = _first()

    def size(self) -> int | None:
        sizes = [file.text_size for file in files.find(self.path)]
        return None if None in sizes else sum(sizes)

    def _fingerprint(self) -> str:
        return files.fingerprint(files.find(self.path))

    def _read(self) -> Iterator[str]:
        for file in files.find(self.path):
            yield from self._read_file(file.path)

    @abc.abstractmethod
    def _read_file(self, path: str) -> Iterator[str]:
        """The texts of one file."""


@dataclass(frozen=True, kw_only=True)
class _Encoded(_Files):
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            check_name("data.encoding", self.encoding, _ENCODINGS)


@dataclass(frozen=True, kw_only=True)
class Text(_Encoded):
    """Plain text files, one document each: a path, a glob ('books/**/*.txt'), an fsspec URL, or
    several of them; .gz .bz2 .xz .zst are decompressed. A file of more than 64 Mi characters
    becomes several documents, cut at line ends."""

    def _read_file(self, path: str) -> Iterator[str]:
        with files.reading(path) as file:
            blocks, size = [], 0
            for block in files.decoded(file, path, self.encoding):
                blocks.append(block)
                size += len(block)
                if size >= PART:
                    whole = "".join(blocks)
                    cut = whole.rfind("\n") + 1 or len(whole)
                    yield whole[:cut]
                    blocks, size = [whole[cut:]], len(whole) - cut
            yield "".join(blocks)


@dataclass(frozen=True, kw_only=True)
class Jsonl(_Encoded):
    """Files of one JSON object per line, whose `field` is the text. A null is no document; blank
    lines are skipped."""

    field: str = "text"

    def _read_file(self, path: str) -> Iterator[str]:
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
                yield _without_surrogates(_text_of(record, self.field, where))


@dataclass(frozen=True, kw_only=True)
class Csv(_Encoded):
    """Comma-separated files with a line of names first, whose column `field` is the text."""

    field: str = "text"
    delimiter: str = ","

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.delimiter) != 1:
            raise UserError(f"data.delimiter={self.delimiter!r} must be one character.")

    def _read_file(self, path: str) -> Iterator[str]:
        csv.field_size_limit(2**31 - 1)  # the default refuses documents of more than 128 KiB
        with files.reading(path) as file:
            rows = csv.reader(files.lines(file, path, self.encoding), delimiter=self.delimiter)
            try:
                names = next(rows, [])
                _check_field(self.field, names, path)
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
class Parquet(_Files):
    """Parquet files whose column `field` is the text, read by row group. A null is no document."""

    field: str = "text"

    def size(self) -> int | None:
        return None  # columns are compressed

    def _read_file(self, path: str) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        with files.reading(path) as file:
            try:
                table = pyarrow.parquet.ParquetFile(file)
                _check_field(self.field, table.schema_arrow.names, path)
                for rows in table.iter_batches(batch_size=512, columns=[self.field]):
                    for text in rows.column(0).to_pylist():
                        yield _text_of({self.field: text}, self.field, path)
            except pyarrow.ArrowException as error:
                raise UserError(
                    f"{path} is not a whole Parquet file ({error}); fetch or write it again."
                ) from None


@dataclass(frozen=True, kw_only=True)
class Tfds(Source):
    """A prepared TFDS dataset, in `data_dir` (local or a bucket; default ~/tensorflow_datasets) or
    in the folder that `name` itself says. `split` may be sliced: 'train[:10%]'. Read without
    TensorFlow; only `field` is decoded."""

    name: str = _first()
    split: str = "train"
    field: str = "text"
    data_dir: str | None = None

    def recipe(self) -> dict[str, Any]:
        recipe = super().recipe()
        del recipe["data_dir"]
        return recipe

    def _fingerprint(self) -> str:
        info = self._builder().info
        shards = {name: list(split.shard_lengths) for name, split in sorted(info.splits.items())}
        return f"{info.full_name} {json.dumps(shards)}"

    def _read(self) -> Iterator[str]:
        import tensorflow_datasets as tfds

        builder = self._builder()
        _check_field(self.field, list(builder.info.features), self.name)
        wanted = tfds.features.FeaturesDict({self.field: builder.info.features[self.field]})
        for number, record in enumerate(self._records(builder)):
            value = wanted.deserialize_example_np(record)[self.field]
            where = f"{self.name}, {self.split}, example {number}"
            try:
                text = value.decode() if isinstance(value, bytes) else value
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: {self.field!r} is not UTF-8 ({error}).") from None
            yield _text_of({self.field: text}, self.field, where)

    def _records(self, builder: Any) -> Iterator[bytes]:
        import tensorflow_datasets as tfds

        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        try:
            parts = builder.info.splits[self.split].file_instructions
        except (KeyError, ValueError):
            known = ", ".join(builder.info.splits)
            raise UserError(
                f"data.split={self.split!r} is not a split of {self.name}: {known}."
            ) from None
        is_array = builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD
        if is_array and "://" not in str(builder.data_path):
            yield from builder.as_data_source(self.split, deserialize_method=raw)
            return
        for part in parts:  # one file each, of which a slice may want only some records
            read = records.array_records if is_array else records.tfrecords
            yield from read(str(part.filename), part.skip, part.skip + part.take)

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            if "://" in self.name or ("/" in self.name and os.path.isdir(self.name)):
                builder = tfds.builder_from_directory(self.name)
            else:
                builder = tfds.builder(self.name, data_dir=self.data_dir)
        except ValueError as error:  # lists every dataset it knows after the first line
            close = nearest(self.name, tfds.list_builders(with_community_datasets=False))
            hint = close if "Did you mean" in close else ""
            reason = str(error).splitlines()[0]
            raise UserError(f"data.name={self.name!r}: {reason}{hint}") from None
        except OSError as error:
            raise UserError(f"data.name={self.name!r} is not a prepared dataset: {error}") from None
        if not builder.info.splits:
            raise UserError(
                f"data.name={self.name!r} is not prepared in {builder.data_dir}; prepare it "
                "there with tfds.builder(...).download_and_prepare(file_format='array_record'), "
                "or set data.data_dir."
            )
        if builder.info.file_format not in (
            tfds.core.FileFormat.ARRAY_RECORD,
            tfds.core.FileFormat.TFRECORD,
        ):
            raise UserError(
                f"data.name={self.name!r} is stored as {builder.info.file_format.value}; "
                "prepare it with file_format='array_record'."
            )
        return builder


@dataclass(frozen=True, kw_only=True)
class StandardLibrary(Source):
    """The *.py files of this interpreter's standard library, tests left out: real text on every
    machine."""

    @property
    def label(self) -> str:
        return "stdlib"

    def size(self) -> int | None:
        return sum(os.path.getsize(path) for path in self._paths())

    def _fingerprint(self) -> str:
        root = sysconfig.get_paths()["stdlib"]
        found = [
            files.File(os.path.relpath(path, root), os.path.getsize(path), "")
            for path in self._paths()
        ]
        return f"Python {sys.version.split()[0]} {files.fingerprint(found)}"

    def _read(self) -> Iterator[str]:
        skipped = 0
        for path in self._paths():
            with open(path, "rb") as file:
                try:
                    yield file.read().decode()
                except UnicodeDecodeError:
                    skipped += 1
        if skipped:
            log.info("%d files of the standard library are not UTF-8 and were skipped", skipped)

    def _paths(self) -> list[str]:
        paths = []
        for folder, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
            folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
            paths += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")]
        return paths


@dataclass(frozen=True, kw_only=True)
class Documents(Source):
    """Texts given in the declaration itself: for tests and notebooks."""

    texts: tuple[str, ...] = _first()

    def size(self) -> int | None:
        return sum(len(text.encode()) for text in self.texts)

    def _fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def _read(self) -> Iterator[str]:
        yield from self.texts


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A folder that `lm.data.prepare` has already filled, with the sources, tokenizer and split it
    was made with. `weights` as in a Mixture."""

    path: str = _first()
    weights: dict[str, float] | tuple[tuple[int, dict[str, float]], ...] = ()


AnySource = Text | Jsonl | Csv | Parquet | Tfds | StandardLibrary | Documents


def _text_of(record: Mapping[str, Any], field: str, where: str) -> str:
    _check_field(field, list(record), where)
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} holds {type(value).__name__}, not text.")
    return value


def _check_field(field: str, known: list[str], where: str) -> None:
    if field not in known:
        raise UserError(f"{where} has no field {field!r} (data.field).{nearest(field, known)}")


def _without_surrogates(text: str) -> str:
    # JSON can spell half of a surrogate pair, which is no character and has no UTF-8.
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
