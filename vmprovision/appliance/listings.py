"""What directories of a guest hold, as the attendant of a restored appliance answers."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmprovision.errors import ApplianceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_HEAD = struct.Struct("=II")  # an errno, and the bytes that follow
_ENTRY = struct.Struct("=5IQ")  # st_mode, st_nlink, st_uid, st_gid, bytes of the target, st_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """The status of one file.

    Attributes:
        mode: ``st_mode`` (inode(7)).
        links: the number of hard links.
        uid: the owner.
        gid: the group.
        size: in bytes.
        target: where a link leads; empty if it cannot be read.
    """

    mode: int
    links: int
    uid: int
    gid: int
    size: int
    target: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What one directory holds.

    Attributes:
        names: of all entries.
        own: the directory's own status, if those of its entries are known.
        entries: the statuses by name; empty if there are many entries, and without those
            that cannot be read.
    """

    names: tuple[bytes, ...]
    own: Described | None = None
    entries: Mapping[bytes, Described] = field(default_factory=dict)


def parse_listings(answer: bytes) -> list[Listing | None]:
    """Return the listings of an answer; None for a directory that could not be read.

    A guest may have taken over the appliance, so nothing in the answer is trusted.

    Raises:
        ApplianceError: it is not an answer.
    """
    found: list[Listing | None] = []
    place = 0
    try:
        while place < len(answer):
            failure, size = _HEAD.unpack_from(answer, place)
            place += _HEAD.size
            found.append(None if failure else _listing(answer[place : place + size]))
            place += size
    except (struct.error, ValueError) as exc:
        raise ApplianceError("the appliance has answered with a damaged listing") from exc
    return found


def _listing(content: bytes) -> Listing:
    names = []
    place = 0
    while content[place : place + 1] != b"\0":
        end = content.index(b"\0", place)
        names.append(content[place:end])
        place = end + 1
    place += 1
    if place == len(content):
        return Listing(names=tuple(names))
    *entries, own = _descriptions(content, place)
    described = dict(zip(names, entries, strict=True))
    return Listing(
        names=tuple(names),
        own=own if own.mode else None,
        entries={name: entry for name, entry in described.items() if entry.mode},
    )


def _descriptions(content: bytes, place: int) -> Iterator[Described]:
    while place < len(content):
        mode, links, uid, gid, length, size = _ENTRY.unpack_from(content, place)
        place += _ENTRY.size
        target = content[place : place + length]
        yield Described(mode=mode, links=links, uid=uid, gid=gid, size=size, target=target)
        place += length
