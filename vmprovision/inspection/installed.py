"""Find the agent that a guest already has, by its receipt, which is checked before it is trusted.

Anyone who can write to the guest can write a receipt, and root later acts on it. So a
receipt may name only paths that an injection can have written. A set-aside copy counts
only in its usual place, named by its content. Set-user-ID, set-group-ID and sticky bits
are never taken from a receipt. If a user other than root could have written the
receipt, restored files belong to that user, and none is put into a directory that only
root can write to.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from vmprovision.changes.conditions import FileCondition, digest
from vmprovision.changes.operations import EditBlock, Symlink, WriteFile
from vmprovision.changes.receipt import (
    ABSENT,
    AGENT,
    CONFIGURATION,
    RECEIPT,
    RECEIPT_LIMIT,
    RUNTIME,
    SET_ASIDE,
    UNFINISHED,
    parse_receipt,
)
from vmprovision.errors import InspectionError
from vmprovision.filesystem.protocol import (
    PERMISSIONS,
    check_size,
    follow,
    read_all,
    resolved_file,
)
from vmprovision.guest.facts import InstalledAgent
from vmprovision.initsystem import DEFINITIONS, systemd
from vmprovision.initsystem.rendering import Service
from vmprovision.selinux.labelling import AUTORELABEL

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import PurePosixPath

    from vmprovision.changes.conditions import ConditionKind
    from vmprovision.changes.receipt import Entry, Found, Receipt
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.definition import Definition

CONFIGURATION_LIMIT = 64 << 10
NOBODY = 65534
_WRITABLE_BY_ALL = 0o002


class Place(NamedTuple):
    """A path where an injection may write, and what it writes there."""

    kind: ConditionKind
    path: PurePosixPath


def find_agent(reader: GuestReader, pid1: Pid1) -> InstalledAgent | None:
    """Return the installed agent by its receipt, or None if there is no receipt.

    Raises:
        InspectionError: the receipt cannot be parsed, or claims what no injection can have
            done.
    """
    home = follow(reader, RECEIPT.parent) or RECEIPT.parent
    unfinished = reader.lstat(UNFINISHED) is not None
    path = UNFINISHED if unfinished else home / RECEIPT.name
    receipt = _read_receipt(reader, path)
    if receipt is None:
        return None
    stranger = _stranger(reader, path)
    fault = _impossible(receipt, home, _Places(reader, pid1))
    if fault:
        raise InspectionError(
            f"guest file {path} claims what no injection can have done at guest path {fault}",
            hint="it is damaged or forged: delete it in the guest to inject as if for the first "
            "time",
        )
    entries = tuple(
        replace(entry, before=_believed(entry, stranger, reader)) for entry in receipt.entries
    )
    notes = []
    if unfinished:
        notes.append(f"an earlier change of this guest was interrupted, as {path} says")
    if stranger and any(entry.before.kind in ("file", "symlink") for entry in entries):
        notes.append(
            f"users other than root could have written {path}, so each file "
            f"that it restores is given to owner {stranger[0]}:{stranger[1]}"
        )
    return InstalledAgent(
        version=receipt.agent_version,
        receipt=replace(receipt, entries=entries),
        configuration=_read_configuration(reader, receipt),
        unfinished=unfinished,
        notes=tuple(notes),
    )


def _read_receipt(reader: GuestReader, path: PurePosixPath) -> Receipt | None:
    status = reader.lstat(path)
    if status is None:
        return None
    if status.kind != "file":
        raise InspectionError(
            f"guest path {path} is a {status.kind}, and the receipt is a file",
            hint="move it out of the way in the guest",
        )
    check_size(path, status.size, RECEIPT_LIMIT)
    _, content = reader.load(path, limit=RECEIPT_LIMIT + 1)
    check_size(path, len(content), RECEIPT_LIMIT)
    return parse_receipt(content, path)


def _read_configuration(reader: GuestReader, receipt: Receipt) -> bytes:
    """Return the agent's configuration; empty if it is gone or another file replaced it."""
    path = (follow(reader, CONFIGURATION.parent) or CONFIGURATION.parent) / CONFIGURATION.name
    entry = receipt.entry_for(path)
    before = entry.before if entry else ABSENT
    try:
        status = reader.lstat(path)
        is_link = status is not None and status.kind == "symlink"
        if is_link and reader.readlink(path) == before.target:
            return b""
        real = resolved_file(reader, path)
        if real is None:
            return b""
        content = read_all(reader, real, CONFIGURATION_LIMIT)
    except InspectionError:  # verify reports it; an upgrade writes it again
        return b""
    return b"" if digest(content) == before.sha256 else content


def _stranger(reader: GuestReader, path: PurePosixPath) -> tuple[int, int] | None:
    """Return the first owner other than root of the path or a directory above it, or None.

    If everybody may write there, the owner is nobody. A group with write access counts
    as root's, because root granted it, as Debian does with ``staff`` in ``/usr/local``.
    """
    for each in (*reversed(path.parents), path):
        status = reader.lstat(each)
        if status is not None and status.uid != 0:
            return status.uid, status.gid
        if status is not None and status.mode & _WRITABLE_BY_ALL and status.kind != "symlink":
            return NOBODY, NOBODY
    return None


def _believed(entry: Entry, stranger: tuple[int, int] | None, reader: GuestReader) -> Found:
    """Return what was at a path before, as far as the receipt can be trusted."""
    before = entry.before
    if before.mode is not None:
        before = replace(before, mode=before.mode & PERMISSIONS)
    if stranger is None or before.kind in ("absent", "directory"):
        return before
    if _stranger(reader, entry.condition.path.parent) is None:
        return replace(before, believed=False)
    return replace(before, uid=stranger[0], gid=stranger[1], label=None)


def _impossible(receipt: Receipt, home: PurePosixPath, known: _Places) -> PurePosixPath | None:
    """Return the first path for which the receipt claims what no injection can have done.

    Args:
        receipt: the guest's receipt.
        home: the directory of the receipt and the set-aside files.
        known: the places where an injection may write.
    """
    folders = (SET_ASIDE, home / SET_ASIDE.name)
    above = {home, *home.parents, *folders}
    for entry in receipt.entries:
        if entry.condition.kind != "directory":
            above.update(entry.condition.path.parents)
    for entry in receipt.entries:
        condition, before = entry.condition, entry.before
        path, absent = condition.path, before.kind == "absent"
        if condition.kind == "directory":
            possible = path in above and before.kind in ("absent", "directory")
        elif condition.kind == "request":
            possible = path == AUTORELABEL and absent
        elif path.parent in folders:
            is_copy = isinstance(condition, FileCondition) and path.name == condition.sha256
            possible = is_copy and absent
        else:
            possible = before.kind != "directory" and known.hold(Place(condition.kind, path))
        if not possible or (before.kept is not None and before.kept.parent not in folders):
            return path
    return None


class _Places:
    """Every place where an injection may write; the guest is searched only if needed."""

    def __init__(self, reader: GuestReader, pid1: Pid1) -> None:
        self._reader = reader
        self._fixed = [
            Place("file", AGENT),
            Place("file", CONFIGURATION),
            Place("file", RUNTIME),
            *(
                place
                for definition in DEFINITIONS
                for verdict in definition.without_guest()
                for place in _places(definition, verdict)
            ),
        ]
        self._pid1 = pid1
        self._found: list[Place] | None = None

    def hold(self, place: Place) -> bool:
        """Return whether an injection of any variant may write this, before or behind links."""
        if any(_agrees(known, place, known.path.parent) for known in self._fixed):
            return True
        # the target that boots may have changed
        if place.kind == "symlink" and systemd.is_enabling_link(place.path, Service().name):
            return True
        if any(self._agrees_behind_links(known, place) for known in self._fixed):
            return True
        if self._found is None:
            self._found = list(self._places_here())
        return any(
            _agrees(known, place, known.path.parent) or self._agrees_behind_links(known, place)
            for known in self._found
        )

    def _agrees_behind_links(self, known: Place, place: Place) -> bool:
        may_be = _agrees(known, place, place.path.parent)
        return may_be and follow(self._reader, known.path.parent) == place.path.parent

    def _places_here(self) -> Iterator[Place]:
        """Yield the places of the service in this guest, for each init system."""
        for definition in DEFINITIONS:
            with contextlib.suppress(InspectionError):  # this init system cannot be used here
                yield from _places(definition, definition.override(self._reader, self._pid1))


def _agrees(known: Place, place: Place, folder: PurePosixPath) -> bool:
    """Return whether a place is known, or has another of the agent's names in the same directory.

    Names change between versions: a preset's, or the order number of a link.
    """
    if known.kind != place.kind or place.path.parent != folder:
        return False
    ours = known.kind != "block" and Service().name in known.path.name
    return place.path.name == known.path.name or (ours and Service().name in place.path.name)


def _places(definition: Definition, verdict: InitVerdict) -> Iterator[Place]:
    for operation in definition.service_operations(Service(), verdict):
        if isinstance(operation, WriteFile):
            yield Place("file", operation.path)
        elif isinstance(operation, Symlink):
            yield Place("symlink", operation.path)
        elif isinstance(operation, EditBlock):
            yield Place("block", operation.path)
