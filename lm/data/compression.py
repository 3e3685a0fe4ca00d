"""Decompression by extension: .gz, .bz2, .xz, .zst, and .zip with one file.

The end of every compressed stream is checked: a file that was cut short raises an error instead of
giving the text up to the cut.
"""

import bz2
import io
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import zstandard

from lm.errors import UserError

_BLOCK = 1 << 20  # decompressed bytes at a time
_READ = 1 << 14  # compressed bytes at a time: bounds the memory of highly compressed text
_MAGIC = {  # the first bytes of files that are not text
    b"\x1f\x8b": "gzip data",
    b"\xfd7zXZ\x00": "xz data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"\x04\x22\x4d\x18": "LZ4 data",
    b"\xff\x06\x00\x00sNaPpY": "Snappy data",
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
}


def _zstandard() -> Any:
    # 2 GiB: the largest window that the command line tool writes, with --ultra --long=31.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


# Each makes an object with decompress(bytes), eof and unused_data for one compressed stream.
_STREAMS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    ".zst": _zstandard,
}


def damaged(path: str, error: object) -> UserError:
    """The error to raise for a file that ends too early or does not decompress."""
    return UserError(f"{path} is cut short or damaged ({error}); fetch or write it again.")


def extension(path: str) -> str:
    """The extension of a file's decompressed content, in lower case: '.jsonl' of x.jsonl.gz."""
    name, last = os.path.splitext(path.lower())
    return os.path.splitext(name)[1] if last in {".zip", *_STREAMS} else last


def decompressed(raw: BinaryIO, path: str) -> BinaryIO:
    """The decompressed bytes of an open file; `raw` itself without a known extension.

    Raises UserError for a zip archive that does not hold exactly one file, and, while reading,
    UserError or EOFError for damaged data.
    """
    last = os.path.splitext(path)[1].lower()
    if last == ".zip":
        blocks = _only_member(raw, path)
    elif last in _STREAMS:
        blocks = _streams(raw, path, _STREAMS[last])
    else:
        return raw
    return io.BufferedReader(_Blocks(blocks), _BLOCK)


def check_text(start: bytes, path: str) -> None:
    """Raises UserError if a file that starts with these bytes is compressed or an archive."""
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    if re.match(rb"BZh[1-9]1AY&SY", start):
        kind = "bzip2 data"
    elif re.match(rb"PAR1[\x00-\x1f]", start):
        kind = "a Parquet file"
    elif kind is None and _is_tar(start):
        kind = "a tar archive"
    if kind is not None:
        raise UserError(
            f"{path} holds {kind}, not text; extract it, or give it the extension of its format "
            f"({', '.join(_STREAMS)} and .zip are read)."
        )


def _is_tar(start: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(start[:512], "utf-8", "surrogateescape")  # compares a checksum
    except tarfile.HeaderError:
        return False
    return True


def _streams(raw: BinaryIO, path: str, begin: Callable[[], Any]) -> Iterator[bytes]:
    """Decompressed blocks of all streams of a file: compressed files may be concatenated."""
    stream, is_empty = None, True
    while data := raw.read(_READ):
        while data:
            if stream is None:
                data = data if is_empty else data.lstrip(b"\0")  # padding between streams
                if not data:
                    break
                stream, is_empty = begin(), False
            try:
                block = stream.decompress(data)
            except Exception as error:  # each library has its own
                raise damaged(path, error) from None
            data = stream.unused_data if stream.eof else b""
            if stream.eof:
                stream = None
            if block:
                yield block
    if stream is not None or is_empty:
        raise EOFError("the compressed data ends too early")


class _Blocks(io.RawIOBase):
    """An iterator of bytes as an unbuffered file."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._rest = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(self._blocks, b"")
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _only_member(raw: BinaryIO, path: str) -> Iterator[bytes]:
    """Decompressed blocks of the only file in a zip archive."""
    try:
        archive = zipfile.ZipFile(raw)
    except (zipfile.BadZipFile, UnicodeError, NotImplementedError) as error:
        # UnicodeError: a name in its directory. NotImplementedError: a version of zip after 6.3.
        raise damaged(path, error) from None
    infos = [info for info in archive.infolist() if not info.is_dir()]
    infos = [info for info in infos if not info.filename.startswith("__MACOSX/")]  # macOS's own
    if len(infos) != 1:
        raise UserError(f"{path} holds {len(infos)} files; extract it and name them.")
    if min(info.header_offset for info in archive.infolist()) > 0:
        raise UserError(f"{path} holds something before the zip archive; extract it.")
    try:
        with archive.open(infos[0]) as member:
            while block := member.read(_BLOCK):
                yield block
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise damaged(path, error) from None
    except RuntimeError as error:
        # It is encrypted, or its method is one that Python does not have, such as Deflate64.
        raise UserError(f"{path} cannot be decompressed ({error}); extract it.") from None
