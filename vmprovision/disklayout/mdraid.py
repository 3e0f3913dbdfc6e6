"""Parse MD superblocks: the array of a device, and which members the array saw active.

By the kernel's ``include/uapi/linux/raid/md_p.h``, version 0.90 and 1.0 are at the
device's end, 1.1 at its beginning, 1.2 at 4096 bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    ReadAt = Callable[[int, int], bytes]  # (offset, length) -> the device's content there

_MAGIC = 0xA92B4EFC
_SIZE = 4096  # of a superblock, including the roles of the members
_OLD_RESERVED = 64 << 10
_NO_ROLE = 0xFD00  # from here on a role is a spare, a journal, or faulty
_ROLES = 256
_OLD_DISKS, _OLD_DISK, _OLD_THIS = 512, 128, 3968
_OLD_DISK_LIMIT = 27
_FAULTY, _SYNC = 1, 4
_RESHAPE = 4  # feature flag of version 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """The superblock of one member of an array.

    Attributes:
        array: the array's UUID, as 32 hexadecimal digits.
        name: the array's name (``host:0``); in version 0.90 its number.
        slots: the number of devices in the array.
        slot: this device's position, or None for a spare.
        events: the count of the array's changes. A member with a lower count has missed
            some.
        active: the positions of the devices that were active at the last change.
        is_reshaped: whether a reshape of the array is under way.
    """

    array: str
    name: str
    slots: int
    slot: int | None
    events: int
    active: frozenset[int]
    is_reshaped: bool = False


def parse_member(read: ReadAt, size: int) -> Member | None:
    """Return the superblock on a device of this size, or None if it has none."""
    ends = ((size >> 9) - 16 & ~7) << 9
    for place in (4096, 0, ends):
        content = read(place, _SIZE) if 0 <= place <= size - _SIZE else b""
        if len(content) == _SIZE and (member := _parse(content, place)):
            return member
    place = (size & -_OLD_RESERVED) - _OLD_RESERVED
    content = read(place, _SIZE) if place >= 0 else b""
    return _parse_old(content) if len(content) == _SIZE else None


def missing_members(members: list[Member]) -> int:
    """Return how many members of an array were active at its last change and are missing here."""
    newest = max(members, key=lambda member: member.events)
    # a member written a moment earlier may be one event behind
    here = {member.slot for member in members if member.events >= newest.events - 1}
    return len(newest.active - here)


def _parse(content: bytes, place: int) -> Member | None:
    magic, major, features = struct.unpack_from("<III", content, 0)
    (where,) = struct.unpack_from("<Q", content, 144)
    if (magic, major, where << 9) != (_MAGIC, 1, place):
        return None
    (slots,) = struct.unpack_from("<I", content, 92)
    (number,) = struct.unpack_from("<I", content, 160)
    (events,) = struct.unpack_from("<Q", content, 200)
    (count,) = struct.unpack_from("<I", content, 220)
    count = min(count, (_SIZE - _ROLES) // 2)
    roles = struct.unpack_from(f"<{count}H", content, _ROLES)
    slot = roles[number] if number < count and roles[number] < _NO_ROLE else None
    return Member(
        array=content[16:32].hex(),
        name=content[32:64].partition(b"\0")[0].decode("utf-8", errors="replace"),
        slots=slots,
        slot=slot,
        events=events,
        active=frozenset(role for role in roles if role < min(slots, _NO_ROLE)),
        is_reshaped=bool(features & _RESHAPE),
    )


def _parse_old(content: bytes) -> Member | None:
    """Parse a superblock of version 0.90, in the byte order of x86."""
    words = struct.unpack(f"<{_SIZE // 4}I", content)
    if words[:2] != (_MAGIC, 0):
        return None
    disks = [
        struct.unpack_from("<5I", content, _OLD_DISKS + number * _OLD_DISK)
        for number in range(_OLD_DISK_LIMIT)
    ]
    slots = words[10]
    _, _, _, slot, state = struct.unpack_from("<5I", content, _OLD_THIS)
    return Member(
        array=struct.pack(">4I", words[5], *words[13:16]).hex(),
        name=str(words[11]),
        slots=slots,
        slot=slot if state & _SYNC and not state & _FAULTY and slot < slots else None,
        events=words[39] | words[40] << 32,
        active=frozenset(
            disk[3]
            for disk in disks
            if disk[4] & _SYNC and not disk[4] & _FAULTY and disk[3] < slots
        ),
        is_reshaped=words[3] >= 91,  # noqa: PLR2004 -- version 0.91 is a reshape of 0.90
    )
