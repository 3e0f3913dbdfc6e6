"""What a guest's files are, as the attendant of a restored appliance answers.

``modappliance.c`` of the bundled runtime writes these answers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmprovision.errors import ApplianceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_HEAD = struct.Struct("=III")  # an errno, what follows, and its bytes
_LISTING, _CONTENT, _STATUS = range(3)
# which of the names, st_mode, st_nlink, st_uid, st_gid, bytes of the target and of the
# label, st_size
_DESCRIPTION = struct.Struct("=7IQ")
_NONE = (1 << 32) - 1  # the directory itself; a label that is not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """The status of one file.

    Attributes:
        mode: ``st_mode`` (inode(7)).
        links: the number of hard links.
        uid: the owner.
        gid: the group.
        size: in bytes.
        target: where a link leads; empty if it is not known.
        label: the SELinux label; empty if there is none, None if it is not known.
    """

    mode: int
    links: int
    uid: int
    gid: int
    size: int
    target: bytes = b""
    label: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What one directory holds.

    Attributes:
        names: of all entries.
        own: the directory's own status, if it is known.
        entries: the statuses that are known, by name.
    """

    names: tuple[bytes, ...]
    own: Described | None = None
    entries: Mapping[bytes, Described] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A small regular file.

    Attributes:
        own: its status.
        content: all its bytes.
    """

    own: Described
    content: bytes


Part = Listing | Content | Described | int


def parse_parts(answer: bytes) -> list[Part]:
    """Return the parts of an answer; an errno for what could not be read.

    A guest may have taken over the appliance, so nothing in the answer is trusted.

    Raises:
        ApplianceError: it is not an answer.
    """
    found: list[Part] = []
    place = 0
    try:
        while place < len(answer):
            failure, kind, size = _HEAD.unpack_from(answer, place)
            place += _HEAD.size
            found.append(failure or _part(kind, answer[place : place + size]))
            place += size
    except (struct.error, ValueError, IndexError) as exc:
        raise ApplianceError("the appliance has answered with damaged statuses") from exc
    return found


def _part(kind: int, body: bytes) -> Part:
    if kind == _LISTING:
        return _listing(body)
    _, own, end = _description(body, 0)
    if kind == _CONTENT:
        return Content(own=own, content=body[end:])
    if kind != _STATUS:
        raise ValueError(kind)
    return own


def _listing(body: bytes) -> Listing:
    names = []
    place = 0
    while body[place : place + 1] != b"\0":
        end = body.index(b"\0", place)
        names.append(body[place:end])
        place = end + 1
    described = dict(_descriptions(body, place + 1))
    own = described.pop(_NONE, None)
    entries = {names[which]: entry for which, entry in described.items()}
    return Listing(names=tuple(names), own=own, entries=entries)


def _descriptions(body: bytes, place: int) -> Iterator[tuple[int, Described]]:
    while place < len(body):
        which, described, place = _description(body, place)
        yield which, described


def _description(body: bytes, place: int) -> tuple[int, Described, int]:
    """Return which name it describes, the description, and where it ends."""
    which, mode, links, uid, gid, target, label, size = _DESCRIPTION.unpack_from(body, place)
    start = place + _DESCRIPTION.size
    middle = start + target
    end = middle + (0 if label == _NONE else label)
    described = Described(
        mode=mode,
        links=links,
        uid=uid,
        gid=gid,
        size=size,
        target=body[start:middle],
        label=None if label == _NONE else body[middle:end],
    )
    return which, described, end
