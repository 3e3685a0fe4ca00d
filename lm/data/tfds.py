"""Source of datasets that TensorFlow Datasets has prepared, read without TensorFlow."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lm.data import records
from lm.data.file_sources import check_field, text_of
from lm.data.sources import Source, positional
from lm.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Tfds(Source):
    """A prepared TFDS dataset. `name` is a dataset in `data_dir` (local or a bucket; default
    ~/tensorflow_datasets), or a path or URL of the dataset's own folder. `split` may be sliced:
    'train[:10%]'. Only `field` is decoded."""

    name: str = positional()
    split: str = "train"
    field: str = "text"
    data_dir: str | None = None

    _locations = ("data_dir",)

    def fingerprint(self) -> str:
        info = self._builder().info
        shards = {name: list(split.shard_lengths) for name, split in sorted(info.splits.items())}
        return f"{info.full_name} {json.dumps(shards)}"

    def read(self) -> Iterator[str]:
        import tensorflow_datasets as tfds

        builder = self._builder()
        check_field(self.field, list(builder.info.features), self.name)
        features = tfds.features.FeaturesDict({self.field: builder.info.features[self.field]})
        for number, record in enumerate(self._records(builder)):
            where = f"{self.name}, {self.split}, example {number}"
            try:
                value = features.deserialize_example_np(record)[self.field]
            except Exception as error:  # of the parser of protocol buffers
                raise UserError(f"{where} is damaged ({error}); prepare it again.") from None
            try:
                text = value.decode() if isinstance(value, bytes) else value
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: {self.field!r} is not UTF-8 ({error}).") from None
            yield text_of({self.field: text}, self.field, where)

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
            if not builder.info.splits[self.split].num_examples:
                return
            try:
                yield from builder.as_data_source(self.split, deserialize_method=raw)
            except (RuntimeError, ValueError, IndexError, OSError) as error:
                raise UserError(f"{self.name} is damaged ({error}); prepare it again.") from None
            return
        for part in parts:  # one file each; a slice may need only some of its records
            read = records.array_records if is_array else records.tfrecords
            yield from read(str(part.filename), part.skip, part.skip + part.take)

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            if "://" in self.name or ("/" in self.name and os.path.isdir(self.name)):
                builder = tfds.builder_from_directory(self.name)
            else:
                builder = tfds.builder(self.name, data_dir=self.data_dir)
        except ValueError as error:  # the lines after the first list every known dataset
            close = nearest(self.name, tfds.list_builders(with_community_datasets=False))
            hint = close if "Did you mean" in close else ""
            reason = str(error).splitlines()[0]
            raise UserError(f"data.name={self.name!r}: {reason}{hint}") from None
        except Exception as error:  # OSError, or that of a damaged dataset_info.json
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
