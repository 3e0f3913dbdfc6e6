"""A file of a disk image, opened once and locked: what was checked is what is used.

A path names whatever stands there at the moment.  So a file is opened here, every
look at it goes through the open file, and other programs get that file and not its
name: QEMU by ``/proc/self/fd`` where it inherits it, by ``add-fd`` where it runs
already.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmprovision.errors import ImageError, ImageNotFoundError, ImageReadOnlyError
from vmprovision.image.lock import take_lock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY)


class ImageReplacedError(ImageError):
    """Another file has taken the image's place while it was worked on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFile:
    """An open file of an image.

    Attributes:
        path: where it was found; for messages, and to find what it refers to.
        handle: the open file, which bears the lock.
    """

    path: Path
    handle: int

    def __str__(self) -> str:
        """Give the path, as messages have it."""
        return str(self.path)

    @property
    def size(self) -> int:
        """Its size in bytes, now."""
        return os.fstat(self.handle).st_size

    @property
    def used(self) -> int:
        """The bytes that it takes on the host's disk, now."""
        return os.fstat(self.handle).st_blocks * 512

    @property
    def identity(self) -> tuple[int, int]:
        """Return what no other file of the host has: device and inode."""
        status = os.fstat(self.handle)
        return status.st_dev, status.st_ino

    def read(self, size: int, offset: int = 0) -> bytes:
        """Return so many bytes from this offset, fewer only at the end of the file."""
        parts = []
        while size > 0 and (part := os.pread(self.handle, size, offset)):
            parts.append(part)
            size -= len(part)
            offset += len(part)
        return b"".join(parts)

    def require_in_place(self) -> None:
        """Refuse to go on where the path leads to another file than the open one.

        Raises:
            ImageReplacedError: it does, or to none.
        """
        try:
            status = self.path.lstat()
        except OSError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self.identity:
            raise ImageReplacedError(
                f"{self} was moved or replaced by another file while it was worked on",
                hint="run the command again, and keep others from the image meanwhile",
            )


def name_of(handle: int) -> str:
    """Return the name by which a program that inherits an open file opens it."""
    return f"/proc/self/fd/{handle}"


def name_for_others(handle: int) -> str:
    """Return the name by which another program of this user opens our open file."""
    return f"/proc/{os.getpid()}/fd/{handle}"


@contextlib.contextmanager
def open_disk_file(path: Path, *, write: bool, at: Path | None = None) -> Iterator[DiskFile]:
    """Hold a file of an image open and locked.

    Args:
        path: the file; the name that messages have.
        write: lock it for writing, against readers of QEMU's kind too.
        at: the path without links, where it is another one.

    Raises:
        ImageLockedError: another program holds it.
        ImageNotFoundError: it is no regular file any more.
        ImageReadOnlyError: it cannot be opened for writing.
        OSError: it cannot be opened at all.
    """
    access = os.O_RDWR if write else os.O_RDONLY
    try:
        handle = os.open(at or path, access | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        if write and exc.errno in _NOT_WRITABLE:
            raise ImageReadOnlyError(
                f"{path} cannot be written: {exc.strerror}",
                hint="make it writable, or write a new image with --output",
            ) from exc
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ImageNotFoundError(f"{path} is no regular file", hint="check the path")
        take_lock(handle, path, write=write)
        yield DiskFile(path=path, handle=handle)
    finally:
        os.close(handle)
