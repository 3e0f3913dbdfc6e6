"""QEMU's own image locks, held by us: a running machine keeps us out, and we keep it out.

QEMU marks what it does with a file by shared locks on single bytes of it, one
for each permission that it uses (from byte 100) and one for each that it denies
to others (from byte 200), and looks whether anybody holds the opposite byte
(QEMU: ``block/file-posix.c``).  Open-file-description locks belong to the open
file, not to the process, so threads of one process keep each other out as well.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
from typing import TYPE_CHECKING

from vmprovision.errors import ImageLockedError, ImageReadOnlyError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

_USES = 100
_DENIES = 200
_READ, _WRITE = 0, 1  # QEMU's BLK_PERM_CONSISTENT_READ and BLK_PERM_WRITE
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@contextlib.contextmanager
def image_lock(path: Path, *, write: bool) -> Iterator[int]:
    """Hold the image against writers, and with ``write`` against readers of QEMU's kind too.

    Gives the open file that bears the lock: a program that inherits it holds the
    image as well, until both have ended.

    Raises:
        ImageLockedError: another program holds it.
        ImageReadOnlyError: it cannot be opened for writing.
        OSError: it cannot be opened at all.
    """
    try:
        handle = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as exc:
        if write and exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
            raise ImageReadOnlyError(
                f"{path} cannot be written: {exc.strerror}",
                hint="make it writable, or write a new image with --output",
            ) from exc
        raise
    try:
        _take(handle, path, write=write)
        yield handle
    finally:
        os.close(handle)


def _take(handle: int, path: Path, *, write: bool) -> None:
    mine = [_USES + _READ, _DENIES + _WRITE] + ([_USES + _WRITE] if write else [])
    opposite = [_USES + _WRITE] + ([_DENIES + _WRITE] if write else [])
    try:
        for byte in mine:
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        held = [byte for byte in opposite if _held_by_others(handle, byte)]
    except OSError as exc:
        if exc.errno in _UNSUPPORTED:
            log.warning("%s: this filesystem has no locks, a running guest goes unseen", path)
            return
        raise
    if held:
        raise ImageLockedError(
            f"{path} is in use by another program, most likely a running virtual machine",
            hint="shut the machine down, or work on a copy",
        )


def _held_by_others(handle: int, byte: int) -> bool:
    answer = fcntl.fcntl(handle, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)
