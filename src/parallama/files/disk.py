"""File operations, each announced before it is done, and what makes them durable. Pure.

What is written whole or not at all (a checkpoint, an export, a log) owes that to the order of its
operations. They all go through here, so that a test can kill the process before each of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

from ..errors import RunError, UsageError, cause, lines

_CHUNK = 1 << 24
_LOCK = ".lock"
_REMEDIES = {
    "make room": {errno.ENOSPC, errno.EDQUOT, errno.EFBIG},
    "make the folder writable": {errno.EACCES, errno.EPERM, errno.EROFS},
    "choose another --out": {
        *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
    },
}


class Disk:
    """File operations; every one may raise `OSError`.

    What was written to a file, and a file's name in its folder, is on the disk for sure only when
    the file, and the folder, were synced.

    Args:
        before: called before each operation with its name and path.
    """

    def __init__(self, before: Callable[[str, Path], None] | None = None) -> None:
        self._before = before or (lambda _operation, _path: None)

    def make_folder(self, path: Path) -> None:
        """A new folder, with those that it is in."""
        self._before("make folder", path)
        path.mkdir(parents=True)

    def create(self, path: Path) -> BinaryIO:
        """A new file, to be written with `write_at` and synced."""
        self._before("create", path)
        return path.open("xb")

    def write_at(
        self, path: Path, stream: BinaryIO, place: int, content: bytes | memoryview
    ) -> None:
        """Write to a file of `create`, from a place on."""
        self._before("write", path)
        stream.seek(place)
        stream.write(content)

    def write(self, path: Path, content: bytes) -> str:
        """Write a new file and its content through to the disk.

        Returns:
            The SHA-256 of what was written.
        """
        self._before("create", path)
        hashed = hashlib.sha256()
        with path.open("xb", buffering=0) as stream:
            self._before("write", path)
            view = memoryview(content)
            while view:
                written = stream.write(view[:_CHUNK])
                hashed.update(view[:written])
                view = view[written:]
            self._before("sync", path)
            os.fsync(stream.fileno())
        return hashed.hexdigest()

    def replace(self, path: Path, content: bytes) -> None:
        """Give a file, new or old, its content whole or not at all."""
        unfinished = path.with_name(f".{path.name}.part")
        self.remove(unfinished)
        self.write(unfinished, content)
        self.rename(unfinished, path)
        self.sync_folder(path.parent)

    def copy(self, source: Path, path: Path) -> None:
        """A new file with another's content, through to the disk."""
        with source.open("rb") as read, self.create(path) as stream:
            self._before("write", path)
            shutil.copyfileobj(read, stream, _CHUNK)
            self.sync(path, stream)

    def sync(self, path: Path, stream: IO[Any]) -> None:
        """Write what was written to an open file through to the disk."""
        self._before("sync", path)
        stream.flush()
        os.fsync(stream.fileno())

    def sync_file(self, path: Path) -> None:
        """Write through to the disk what somebody else wrote to a file."""
        with path.open("rb") as stream:
            self.sync(path, stream)

    def sync_folder(self, path: Path) -> None:
        """Write a folder's entries through to the disk."""
        self._before("sync folder", path)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, path: Path, to: Path) -> None:
        """Move, at once; a file or link at the target is replaced."""
        self._before("rename", to)
        path.replace(to)

    def link(self, path: Path, target: str) -> None:
        """A new symbolic link."""
        self._before("link", path)
        path.symlink_to(target)

    def remove(self, path: Path) -> None:
        """A link, or a folder with all that is in it."""
        self._before("remove", path)
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remedy(error: OSError) -> str:
    """What to do about an error, in words."""
    for what, numbers in _REMEDIES.items():
        if error.errno in numbers:
            return what
    return "check the disk"


def unwritable(what: str, path: Path, error: OSError) -> RunError:
    """A file or folder of a run that can't be written."""
    return RunError(
        lines(
            f"{what} {str(path)!r} cannot be written: {error.strerror or cause(error)}",
            "expected room, and the right to write there",
            f"{remedy(error)}, then go on with --resume auto",
        )
    )


class RunLock:
    """Holds a run's folder for this process.

    The system lets go of it when the process ends, however it does.

    Raises:
        UsageError: another process holds it.
        RunError: the folder can't be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = [each for each in (folder, *folder.parents) if not each.exists()]
        self._is_new = not (folder / _LOCK).exists()
        self._stream = self._locked()
        try:
            self._stream.truncate(0)
            self._stream.write(str(os.getpid()))
            self._stream.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # it tries to write once more
                self._stream.close()
            raise unwritable("the run's folder", folder, error) from None

    def _locked(self) -> IO[str]:
        """The lock's file, held."""
        path = self._folder / _LOCK
        while True:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                stream: IO[str] = path.open("a+", encoding="utf-8")
            except OSError as error:
                raise unwritable("the run's folder", self._folder, error) from None
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                stream.seek(0)
                holder = stream.read().strip() or "unknown"
                stream.close()
                raise UsageError(
                    lines(
                        f"the run's folder {str(self._folder)!r} is being written "
                        f"by another process (id {holder})",
                        "expected a folder for each run",
                        "wait for it, or choose another --out",
                    )
                ) from None
            with contextlib.suppress(OSError):
                if os.path.samestat(path.stat(), os.fstat(stream.fileno())):
                    return stream
            stream.close()  # its holder has removed it meanwhile

    def withdraw(self, *files: str) -> None:
        """Leave nothing of a run that didn't begin: these files of its folder, and folders made.

        A folder in which there is something else stays.
        """
        lock = (_LOCK,) if self._is_new else ()
        with contextlib.suppress(OSError):
            for name in (*files, *lock):
                (self._folder / name).unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()

    def release(self) -> None:
        """Let another process have it."""
        self._stream.close()
