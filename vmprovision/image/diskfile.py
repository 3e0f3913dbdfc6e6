"""A file of a disk image, opened and locked once, so that what was checked is what is used.

A path may lead to another file at any time. So every read goes through the open file,
and other programs get that file and not its path. QEMU opens ``/proc/self/fd`` if it
inherits the file, and gets it by ``add-fd`` if it runs already.
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
    """The file at the image's path was replaced while the image was in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFile:
    """An open file of an image.

    Attributes:
        path: where it was found; for messages, and to resolve references.
        handle: the file descriptor, which holds the lock.
    """

    path: Path
    handle: int

    def __str__(self) -> str:
        """Return the path, for messages."""
        return str(self.path)

    @property
    def size(self) -> int:
        """The size in bytes, now."""
        return os.fstat(self.handle).st_size

    @property
    def used(self) -> int:
        """The bytes allocated on the host's disk, now."""
        return os.fstat(self.handle).st_blocks * 512

    @property
    def identity(self) -> tuple[int, int]:
        """Return device and inode, which identify the file on this host."""
        status = os.fstat(self.handle)
        return status.st_dev, status.st_ino

    def read(self, size: int, offset: int = 0) -> bytes:
        """Return ``size`` bytes from this offset, fewer only at the end of the file."""
        parts = []
        while size > 0 and (part := os.pread(self.handle, size, offset)):
            parts.append(part)
            size -= len(part)
            offset += len(part)
        return b"".join(parts)

    def require_in_place(self) -> None:
        """Raise an error if the path no longer leads to the open file.

        Raises:
            ImageReplacedError: it leads to another file, or to none.
        """
        try:
            status = self.path.lstat()
        except OSError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self.identity:
            raise ImageReplacedError(
                f"{self} was moved or replaced while it was in use",
                hint="run the command again, and keep other programs away from the image",
            )


def name_of(handle: int) -> str:
    """Return the path by which a child process opens an inherited file."""
    return f"/proc/self/fd/{handle}"


def name_for_others(handle: int) -> str:
    """Return the path by which another process of this user opens this open file."""
    return f"/proc/{os.getpid()}/fd/{handle}"


@contextlib.contextmanager
def open_disk_file(path: Path, *, write: bool, at: Path | None = None) -> Iterator[DiskFile]:
    """Open and lock a file of an image.

    Args:
        path: the file, as messages name it.
        write: lock it for writing, which also excludes QEMU's readers.
        at: the path without links, if it differs.

    Raises:
        ImageLockedError: another program holds it.
        ImageNotFoundError: it is no longer a regular file.
        ImageReadOnlyError: it cannot be opened for writing.
        OSError: it cannot be opened.
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
            raise ImageNotFoundError(f"{path} is not a regular file", hint="check the path")
        take_lock(handle, path, write=write)
        yield DiskFile(path=path, handle=handle)
    finally:
        os.close(handle)
