"""A folder of prepared data, local or at an fsspec URL. Writes are atomic: a file is complete or
absent."""

import errno
import hashlib
import os
import tempfile
from pathlib import Path

import fsspec

from lm.errors import UserError


class Folder:
    """Reads and writes files by their name within the folder, as in 'web/train-00000.tokens'."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = str(path)
        self.is_remote = "://" in self.path
        try:
            if self.is_remote:
                self._fs, self._root = fsspec.core.url_to_fs(self.path)
            else:
                self._fs, self._root = fsspec.filesystem("file"), os.path.abspath(self.path)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.path} cannot be opened: {error}.") from None

    def __str__(self) -> str:
        return self.path

    def path_to(self, name: str) -> str:
        """The path of a file, for messages."""
        return f"{self.path.rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it does not exist."""
        try:
            return self._fs.info(self._inner(name))["size"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path_to(name)} cannot be opened: {error}.") from None

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if it does not exist."""
        try:
            return self._fs.cat_file(self._inner(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path_to(name)} cannot be read: {error}.") from None

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Writes a file atomically. Raises UserError for a full disk or a read-only folder."""
        try:
            if self.is_remote:
                # Objects in a bucket appear only when complete.
                self._fs.pipe_file(self._inner(name), bytes(data))
            else:
                _write_atomically(Path(self._inner(name)), data)
        except PermissionError:
            raise UserError(f"{self.path} is not writable; choose another --workdir.") from None
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.path} is a file; name a folder.") from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"The disk of {self.path} is full: {name} needs {len(data):,} bytes. "
                "Make room and run the same command again; finished files are kept."
            ) from None

    def local(self, name: str, checksum: str) -> str:
        """A local path to a file. A remote file is copied to the user's cache, under its checksum.

        Raises UserError if the copy has another checksum.
        """
        if not self.is_remote:
            return self._inner(name)
        home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        copy = Path(home) / "lm" / "tokens" / checksum
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=copy.parent)
            os.close(handle)
            self._fs.get_file(self._inner(name), temporary)
            if digest(Path(temporary).read_bytes()) != checksum:
                raise UserError(
                    f"{self.path_to(name)} is damaged: its checksum differs. "
                    "Delete it and prepare again."
                )
            os.replace(temporary, copy)
        return str(copy)

    def _inner(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def check_can_be_made(folder: str | os.PathLike[str]) -> None:
    """Raises UserError if a local folder does not exist and cannot be made, or is not writable."""
    path = Path(folder).absolute()
    try:
        existing = next(each for each in (path, *path.parents) if each.exists())
    except OSError as error:  # a name that is too long
        raise UserError(f"{path.name[:40]!r}... names no folder: {error.strerror}.") from None
    if not existing.is_dir():
        raise UserError(f"{existing} is a file; name a folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} is not writable; name a folder that you may write to.")


def digest(data: bytes | memoryview) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _write_atomically(path: Path, data: bytes | memoryview) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
