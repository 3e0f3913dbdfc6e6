"""The seal of a redo log: an authenticated record of the image that it is for.

Anyone can put a file with a redo log's name beside an image, for instance by unpacking
an archive. So sealing appends a record to the qcow2, and an HMAC (RFC 2104) of all
bytes before it. Only this user on this host has the key. Both are on the disk before
the redo log gets its new name.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import struct
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from vmprovision.image.hostkey import host_key

if TYPE_CHECKING:
    from vmprovision.image.diskfile import DiskFile

_RECORD_MAGIC = b"vmprovision-redo"
_RECORD_END = struct.Struct(">32sI16s")  # the HMAC, the record's length, the magic number
_RECORD_LIMIT = 64 << 10
_READ_SIZE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a sealed redo log is for.

    Attributes:
        format: the image's disk format.
        size: the size of the image's file when it was sealed.
        mtime: its modification time then, in nanoseconds.
        inode: its inode.
        outside: whether the caller allowed references out of the image's folder.
        group: what all redo logs that were sealed together share.
        leader: the image whose redo log decides about this one; empty for the leader's own.
        leader_inode: its inode.
        followers: the images whose redo logs are merged before this one: path and inode.
    """

    format: str
    size: int
    mtime: int
    inode: int
    outside: bool
    group: str = ""
    leader: str = ""
    leader_inode: int = 0
    followers: tuple[tuple[str, int], ...] = ()


def append_record(file: DiskFile, record: Record) -> None:
    """Append the record and its HMAC to the redo log."""
    size = file.size
    text = json.dumps(asdict(record)).encode()
    code = _code(file, size, text)
    os.pwrite(file.handle, text + _RECORD_END.pack(code, len(text), _RECORD_MAGIC), size)


def read_record(file: DiskFile, *, trust: bool) -> Record | None:
    """Return the record of a sealed redo log, or None if it has no authentic one."""
    size = file.size
    end = file.read(_RECORD_END.size, max(0, size - _RECORD_END.size))
    try:
        code, length, magic = _RECORD_END.unpack(end)
    except struct.error:
        return None
    start = size - _RECORD_END.size - length
    if magic != _RECORD_MAGIC or length > _RECORD_LIMIT or start < 0:
        return None
    text = file.read(length, start)
    if not trust and not hmac.compare_digest(code, _code(file, start, text)):
        return None
    try:
        found = json.loads(text)
        followers = tuple((str(path), int(inode)) for path, inode in found.pop("followers", ()))
        return Record(**found, followers=followers)
    except (ValueError, TypeError):  # of another version, or trusted but damaged
        return None


def _code(file: DiskFile, size: int, text: bytes) -> bytes:
    """Return the HMAC of the first bytes of a file and the record after them."""
    code = hmac.new(host_key(), digestmod=hashlib.sha256)
    for offset in range(0, size, _READ_SIZE):
        code.update(file.read(min(_READ_SIZE, size - offset), offset))
    code.update(text)
    return code.digest()
