"""Record files of TFDS, read without TensorFlow from a path or an fsspec URL."""

import os
import struct
import tempfile
from collections.abc import Iterator

import fsspec

from lm.data import files
from lm.errors import UserError


def tfrecords(path: str, start: int, stop: int) -> Iterator[bytes]:
    """Records start to stop of a TFRecord file. Raises UserError for a file with fewer records.

    A record is its length (uint64) and the length's checksum (uint32), the bytes, and their
    checksum (uint32).
    """
    with files.reading(path) as file:
        for number in range(stop):
            header = file.read(12)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else 0
            try:
                record = file.read(length + 4)
            except (OverflowError, MemoryError):  # a damaged length
                record = b""
            if len(header) < 12 or len(record) < length + 4:
                raise UserError(f"{path} is damaged: it ends after {number} of {stop} records.")
            if number >= start:
                yield record[:length]


def array_records(path: str, start: int, stop: int) -> Iterator[bytes]:
    """Records start to stop of an array_record file. The format needs random access, so the file is
    copied to a temporary local folder."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "records")
        fs, inner = fsspec.core.url_to_fs(path)
        fs.get_file(inner, copy)
        try:
            source = ArrayRecordDataSource([copy])
            for index in range(start, stop):
                yield source[index]
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{path} is damaged ({error}); prepare it again.") from None
