"""Files that are whole or what they were before: written beside, brought onto the disk, then renamed.

Whatever stops a writer, a full disk or a power cut, the name stands for the old content or for all of the new one.
"""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_BESIDE = ".new"  # ends the name of a file that is being written


class NotWritten(OSError):
    """A file could not be written; the message names it, why, the bytes it takes and those that are free."""


class Displaced(OSError):
    """An open file no longer has its name: its folder was moved or deleted."""


class Replacement:
    """A file that takes the place of ``path`` when the context is left without an error, and else is removed.

    Args:
        path: in a folder that exists.
        nbytes: what the file will take, for the message where it is known; without it, what was written so far.
    """

    def __init__(self, path: Path, nbytes: int | None = None) -> None:
        self._path, self._nbytes, self._written = path, nbytes, 0
        self._beside = _beside(path)
        with _named(path, nbytes):
            # unbuffered: an error is raised by the write that meets it, not once more when the file is closed
            self._file = self._beside.open("wb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._take_place()
        else:
            self._give_up()

    def write(self, data: Any) -> int:
        """Write a buffer of bytes in one dimension, all of it, and return their number."""
        rest = memoryview(data)
        size = rest.nbytes
        with _named(self._path, self._nbytes or self._written + size):
            while rest:
                count = self._file.write(rest)
                self._written, rest = self._written + count, rest[count:]
        return size

    def seek(self, position: int) -> None:
        """Go to a byte of the file."""
        self._file.seek(position)

    def truncate(self, size: int) -> None:
        """Make the file so many bytes long."""
        with _named(self._path, size):
            self._file.truncate(size)

    def _take_place(self) -> None:
        try:
            with _named(self._path, self._nbytes or self._written):
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._beside, self._path)
                sync_folder(self._path.parent)
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        with suppress(OSError):
            self._file.close()
        self._beside.unlink(missing_ok=True)


class AppendedFile:
    """A file that grows by whole writes: what a full disk keeps out is taken back, and written with the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size
        self._waiting = b""

    def add(self, data: bytes) -> None:
        """Write ``data`` at the end, after what is still waiting.

        Raises:
            NotWritten: all of it waits for the next call.
            Displaced: as :meth:`refuse_displaced`.
        """
        self.refuse_displaced()
        self._waiting += data
        try:
            with _named(self._path, len(self._waiting)):
                if self._file.write(self._waiting) < len(self._waiting):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except NotWritten:
            self._file.truncate(self._size)
            raise
        self._size, self._waiting = self._size + len(self._waiting), b""

    def refuse_displaced(self) -> None:
        """Raise Displaced where the file's name is gone, or stands for another file: what is written is not found."""
        try:
            there = os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            there = False
        if not there:
            raise Displaced(f"{self._path} was moved or deleted while it was written to")

    def close(self) -> None:
        """What still waits is lost."""
        self._file.close()


def write_whole(path: Path, data: bytes) -> None:
    """Replace ``path`` by a file of ``data``.

    Raises:
        NotWritten: it could not be; what was there before still is.
    """
    with Replacement(path, len(data)) as file:
        file.write(data)


def copy_whole(source: Path, target: Path) -> None:
    """Replace ``target`` by a copy of ``source``, and make its folder where there is none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, Replacement(target, source.stat().st_size) as file:
        shutil.copyfileobj(read, file)


@contextmanager
def written_elsewhere(path: Path, nbytes: int | None = None) -> Iterator[Path]:
    """The path beside ``path`` at which a library that opens files itself writes what takes its place at the end."""
    beside = _beside(path)
    try:
        with _named(path, nbytes):
            yield beside
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
            sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` on the disk: a file or a rename is not there after a power cut without this."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_bytes(folder: Path) -> int | None:
    """What this user may still write where ``folder`` is or will be; None where the file system does not say."""
    usage = disk_usage(folder)
    return usage.free if usage.total else None  # some network file systems say 0 of 0


def disk_usage(path: Path) -> Any:
    """``shutil.disk_usage`` of where ``path`` is, or will be once it is made."""
    return shutil.disk_usage(next(at for at in (path.absolute(), *path.absolute().parents) if at.exists()))


def folder_bytes(paths: Iterable[Path]) -> int:
    """The sizes of all files in and under ``paths``."""
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    return sum(file.lstat().st_size for file in files if file.is_file())


def _beside(path: Path) -> Path:
    return path.with_name(path.name + _BESIDE)


@contextmanager
def _named(path: Path, nbytes: int | None) -> Iterator[None]:
    """Say of an error of the system which file it stopped, and whether room was what it lacked."""
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        raise _not_written(path, nbytes, error) from error


def _not_written(path: Path, nbytes: int | None, error: OSError) -> NotWritten:
    takes = "" if nbytes is None else f"; it takes {nbytes:,} bytes"
    raised = NotWritten(f"{path} was not written: {error.strerror or error}{takes}{_free_there(path.parent)}")
    raised.errno = error.errno
    return raised


def _free_there(folder: Path) -> str:
    with suppress(OSError):
        free = free_bytes(folder)
        if free is not None:
            return f", {free:,} are free there"
    return ""
