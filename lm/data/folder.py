"""A folder of prepared data, local or at an fsspec URL. A file in it is whole or absent: written
aside, then renamed."""

import errno
import hashlib
import os
import tempfile
from pathlib import Path

import fsspec

from lm.errors import UserError


class Folder:
    """Files by their name within the folder, as in 'web/train-00000.tokens'."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = str(path)
        self.is_remote = "://" in self.path
        self._fs, self._root = fsspec.core.url_to_fs(self.path)

    def __str__(self) -> str:
        return self.path

    def where(self, name: str) -> str:
        """The path of a file, for messages."""
        return f"{self.path.rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""
        try:
            return self._fs.info(self._inner(name))["size"]
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if it is not there."""
        try:
            return self._fs.cat_file(self._inner(name))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Writes a file in one go. Raises UserError when the disk is full or the folder may not be
        written."""
        try:
            if self.is_remote:
                self._fs.pipe_file(
                    self._inner(name), bytes(data)
                )  # a bucket shows whole objects only
            else:
                _write_aside(Path(self._inner(name)), data)
        except PermissionError:
            raise UserError(f"{self.path} may not be written; choose another --workdir.") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"The disk of {self.path} is full: {name} needs {len(data):,} bytes. "
                "Make room and run the same command again; what is finished is kept."
            ) from None

    def local(self, name: str, checksum: str) -> str:
        """A local path to a file: itself, or a copy of the remote file in the user's cache, by its
        checksum."""
        if not self.is_remote:
            return self._inner(name)
        home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        copy = Path(home) / "lm" / "tokens" / checksum
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=copy.parent)
            os.close(handle)
            self._fs.get_file(self._inner(name), aside)
            if digest(Path(aside).read_bytes()) != checksum:
                raise UserError(
                    f"{self.where(name)} is damaged: its checksum is another. "
                    "Delete it and prepare again."
                )
            os.replace(aside, copy)
        return str(copy)

    def _inner(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def digest(data: bytes | memoryview) -> str:
    """sha256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _write_aside(path: Path, data: bytes | memoryview) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
