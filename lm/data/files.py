"""Files of text: found by path, glob or URL, opened through fsspec, decompressed by extension,
decoded strictly.

Whatever is wrong with one is a UserError sentence that names the file, and the line or byte where
there is one.
"""

import codecs
import contextlib
import hashlib
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec

from lm.errors import UserError, nearest

BLOCK = 1 << 20  # bytes read at a time
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip", ".lzma"}


@dataclass(frozen=True)
class File:
    """A file as it was found. `stamp` changes when it is written again: its time, or the bucket's
    tag."""

    path: str
    size: int | None
    stamp: str

    @property
    def text_size(self) -> int | None:
        """Bytes of text in it, where that is known before reading: not when compressed."""
        return None if os.path.splitext(self.path)[1] in _COMPRESSED else self.size


def find(path: str | tuple[str, ...]) -> list[File]:
    """The files behind a path, a glob, a URL, or several of them; each once, those of a glob
    sorted.

    Raises UserError for a path or glob that finds nothing.
    """
    paths = (path,) if isinstance(path, str) else tuple(path)
    if not paths:
        raise UserError("path=() names no file; give a path, as in path='books/*.txt'.")
    found = {file.path: file for one in paths for file in _find(one)}
    return list(found.values())


def fingerprint(files: list[File]) -> str:
    """A digest of names, sizes and times: another one means that something has changed."""
    lines = [f"{os.path.basename(file.path)}\t{file.size}\t{file.stamp}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextlib.contextmanager
def reading(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed. What goes wrong inside, also later while reading, is
    refused by name."""
    _check_zstandard(path)
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            yield file
    except FileNotFoundError:
        raise UserError(_missing(path)) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name its files, as in '{path}/*.txt'.") from None
    except PermissionError:
        raise UserError(f"{path} may not be read: its permissions forbid it.") from None
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise UserError(
            f"{path} is cut short or damaged ({error}); fetch or write it again."
        ) from error


def decoded(file: BinaryIO, path: str, encoding: str) -> Iterator[str]:
    """The text of a file in blocks. Raises UserError with the offset of the first byte that is not of
    this encoding."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    before = 0  # bytes handed to the decoder so far
    block = file.read(BLOCK)
    while True:
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = before - (len(error.object) - len(block)) + error.start
            raise UserError(
                f"{path}: byte {offset} ({error.object[error.start]:#04x}) is not {encoding}. "
                "Convert the file, or name its encoding, as in encoding='latin-1'."
            ) from None
        if before == 0:
            text = text.removeprefix("\ufeff")  # a byte-order mark is not text
        before += len(block)
        if text:
            yield text
        if not block:
            return
        block = file.read(BLOCK)


def lines(file: BinaryIO, path: str, encoding: str) -> Iterator[str]:
    """The lines of a file with their line ends; only '\\n' ends one."""
    held = ""
    for block in decoded(file, path, encoding):
        *whole, held = (held + block).split("\n")
        for line in whole:
            yield line + "\n"
    if held:
        yield held


def _find(path: str) -> list[File]:
    try:
        fs, inner = fsspec.core.url_to_fs(os.path.expanduser(path))
    except (ImportError, ValueError) as error:
        raise UserError(f"{path} cannot be opened: {error}") from None
    is_local = "://" not in path
    if any(sign in inner for sign in "*?[") and not fs.exists(inner):
        found = sorted(fs.glob(inner, detail=True).items())
        infos = [(name, info) for name, info in found if info["type"] == "file"]
        if not infos:
            raise UserError(f"path={path!r} matches no file.")
    else:
        try:
            infos = [(inner, fs.info(inner))]
        except FileNotFoundError:
            raise UserError(_missing(path)) from None
        except OSError as error:
            raise UserError(f"{path} may not be read: {error}") from None
        if infos[0][1]["type"] == "directory":
            raise UserError(f"{path} is a folder; name its files, as in '{path}/*.txt'.")
    return [
        File(name if is_local else fs.unstrip_protocol(name), info.get("size"), _stamp(info))
        for name, info in infos
    ]


def _stamp(info: dict[str, Any]) -> str:
    known = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated")
    return str(next((info[key] for key in known if info.get(key)), ""))


def _missing(path: str) -> str:
    folder, name = os.path.split(os.path.expanduser(path))
    hint = ""
    if "://" not in path and os.path.isdir(folder or "."):
        close = nearest(name, os.listdir(folder or "."))
        hint = close if "Did you mean" in close else ""
    return f"There is no file {path!r}.{hint}"


def _check_zstandard(path: str) -> None:
    if path.endswith(".zst") and "zstd" not in fsspec.available_compressions():
        raise UserError(f"{path} needs one more package: pip install zstandard")
