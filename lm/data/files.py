"""Text files: found by path, glob or URL, opened through fsspec, decompressed by extension, decoded
strictly.

Every error is a UserError that names the file, and the line or byte offset where there is one.
"""

import codecs
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec

from lm.data import compression
from lm.errors import UserError, nearest

BLOCK = 1 << 20  # bytes per read


@dataclass(frozen=True)
class File:
    """A file that `find` returned.

    size   bytes on disk; None where the filesystem does not report it
    stamp  changes when the file is rewritten: modification time, or the bucket's tag
    """

    path: str
    size: int | None
    stamp: str


def find(path: str | tuple[str, ...]) -> list[File]:
    """The files of a path, a glob, a URL or several of them, without duplicates. Matches of a glob
    are sorted.

    Raises UserError for a path or glob without a file.
    """
    paths = (path,) if isinstance(path, str) else path
    return list({file.path: file for each in paths for file in _find(each)}.values())


def fingerprint(files: list[File]) -> str:
    """A digest of names, sizes and stamps: changes when one of the files changes."""
    lines = [f"{os.path.basename(file.path)}\t{file.size}\t{file.stamp}" for file in files]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()


# Called with bytes read from disk. A context variable, since a file is opened inside the generator
# of a source, which need not know about progress bars.
_on_read: ContextVar[Callable[[int], None] | None] = ContextVar("on_read", default=None)


@contextlib.contextmanager
def on_read(advance: Callable[[int], None] | None) -> Iterator[None]:
    """Within this context, `advance(n)` is called when n more bytes of a file have been read from
    disk, before decompression."""
    token = _on_read.set(advance)
    try:
        yield
    finally:
        _on_read.reset(token)


@contextlib.contextmanager
def reading(path: str) -> Iterator[BinaryIO]:
    """Opens a file for reading its decompressed bytes. An OSError or decompression error inside the
    context becomes a UserError that names the file."""
    try:
        with open(path, "rb") if "://" not in path else fsspec.open(path, "rb") as raw:
            file, advance = compression.decompressed(raw, path), _on_read.get()
            yield file if advance is None else _Reported(file, raw, advance)
    except FileNotFoundError:
        raise UserError(_missing(path)) from None
    except IsADirectoryError:
        raise UserError(_is_folder(path)) from None
    except PermissionError:
        raise UserError(f"{path} cannot be read: permission denied.") from None
    except (EOFError, OSError) as error:
        raise compression.damaged(path, error) from error


class _Reported:
    """An open file that reports the progress of `raw`, the compressed file below it."""

    def __init__(self, file: BinaryIO, raw: BinaryIO, advance: Callable[[int], None]):
        self._file, self._raw, self._advance = file, raw, advance
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        position = self._raw.tell()
        if position > self._position:  # a zip file is read from its end first
            self._advance(position - self._position)
            self._position = position
        return block

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def decoded(file: BinaryIO, path: str, encoding: str) -> Iterator[str]:
    """The text of a file in blocks, without a byte-order mark. Raises UserError with the offset of
    the first byte that is invalid in this encoding, and for an archive."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    bytes_decoded, is_start = 0, True
    block = file.read(BLOCK)
    compression.check_text(block, path)
    while True:
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            # The decoder's input is what it buffered from earlier blocks, then this block.
            offset = bytes_decoded - (len(error.object) - len(block)) + error.start
            raise UserError(
                f"{path}: byte {offset} ({error.object[error.start]:#04x}) is not {encoding}. "
                f"Convert the file, or set its encoding, as in {_other_encoding(error.object)}."
            ) from None
        except UnicodeError as error:
            raise UserError(f"{path} is not {encoding} ({error}); set its encoding.") from None
        bytes_decoded += len(block)
        if text and is_start:
            text, is_start = text.removeprefix("\ufeff"), False
        if text:
            yield text
        if not block:
            return
        block = file.read(BLOCK)


def _other_encoding(start: bytes) -> str:
    is_utf16 = start[:2] in (b"\xff\xfe", b"\xfe\xff")
    return f"encoding='{'utf-16' if is_utf16 else 'latin-1'}'"


def lines(file: BinaryIO, path: str, encoding: str) -> Iterator[str]:
    """The lines of a file, line ends included. Only '\\n' ends a line."""
    parts: list[str] = []  # of a line that continues in the next block
    for block in decoded(file, path, encoding):
        first, *others = block.split("\n")
        parts.append(first)
        for part in others:
            yield "".join(parts) + "\n"
            parts = [part]
    if last := "".join(parts):
        yield last


def _find(path: str) -> list[File]:
    is_local = "://" not in path
    try:
        if is_local:
            fs, inner = fsspec.filesystem("file"), os.path.abspath(os.path.expanduser(path))
        else:
            fs, inner = fsspec.core.url_to_fs(path)
        is_glob = any(sign in inner for sign in "*?[") and not fs.exists(inner)
        infos = (
            sorted(fs.glob(inner, detail=True).items()) if is_glob else [(inner, fs.info(inner))]
        )
    except FileNotFoundError:
        raise UserError(_missing(path)) from None
    except Exception as error:  # each filesystem has its own
        raise UserError(f"{path} cannot be opened: {error}.") from None
    if is_glob:
        infos = [(name, info) for name, info in infos if info["type"] != "directory"]
        if not infos:
            raise UserError(f"path={path!r} matches no file.")
    elif infos[0][1]["type"] == "directory":
        raise UserError(_is_folder(path))
    for name, info in infos:
        if info["type"] != "file":
            reason = "its link leads nowhere" if info.get("islink") else "it is a pipe or a device"
            raise UserError(f"{name} is no regular file: {reason}; remove it, or name others.")
    return [
        File(name if is_local else fs.unstrip_protocol(name), info.get("size"), _stamp(info))
        for name, info in infos
    ]


def _stamp(info: dict[str, Any]) -> str:
    # The field's name depends on the filesystem.
    names = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated")
    return str(next((info[name] for name in names if info.get(name)), ""))


def _missing(path: str) -> str:
    folder, name = os.path.split(os.path.expanduser(path))
    hint = ""
    if "://" not in path and os.path.isdir(folder or "."):
        files = [entry.name for entry in os.scandir(folder or ".") if _is_file(entry)]
        close = nearest(name, files)
        hint = close if "Did you mean" in close else ""
    return f"There is no file {path!r}.{hint}"


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # links that lead to one another
        return False


def _is_folder(path: str) -> str:
    return f"{path} is a folder; name its files, as in '{path}/*.txt'."
