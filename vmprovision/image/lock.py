"""Take QEMU's own image locks, so that a running machine and vmprovision exclude each other.

QEMU marks its use of a file by shared locks on single bytes: one for each permission
that it uses (from byte 100) and one for each that it denies to others (from byte 200).
It then checks whether another process holds the opposite byte (QEMU:
``block/file-posix.c``). Open-file-description locks belong to the open file, not to the
process, so they also exclude other threads of one process.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from typing import TYPE_CHECKING

from vmprovision.errors import ImageLockedError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

_USES = 100
_DENIES = 200
_READ, _WRITE = 0, 1  # QEMU's BLK_PERM_CONSISTENT_READ and BLK_PERM_WRITE
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def take_lock(handle: int, path: Path, *, write: bool) -> None:
    """Lock an open file against writers, and with ``write`` also against QEMU's readers.

    The open file holds the lock. So a program that inherits it holds the lock too, until
    both have ended.

    Raises:
        ImageLockedError: another program holds it.
        OSError: it cannot be locked, though its filesystem supports locks.
    """
    mine = [_USES + _READ, _DENIES + _WRITE] + ([_USES + _WRITE] if write else [])
    opposite = [_USES + _WRITE] + ([_DENIES + _WRITE] if write else [])
    try:
        for byte in mine:
            fcntl.fcntl(handle, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        held = [byte for byte in opposite if _held_by_others(handle, byte)]
    except OSError as exc:
        if exc.errno in _UNSUPPORTED:
            log.warning("%s: no locks here, so a running guest cannot be detected", path)
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
