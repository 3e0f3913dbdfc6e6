"""Survey what is in a guest before a change, set it aside, and plan its restoration.

An injection keeps a copy of every file that it replaces or edits below ``set-aside/``.
So ``remove`` can restore it byte for byte, even years later and on another host.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vmprovision.changes.blocks import strip_blocks
from vmprovision.changes.conditions import (
    FILE_LIMIT,
    BlockCondition,
    RequestCondition,
    digest,
)
from vmprovision.changes.operations import (
    EditBlock,
    MakeDirectory,
    Operation,
    Plan,
    Remove,
    Symlink,
    WriteFile,
    is_satisfied,
)
from vmprovision.changes.receipt import (
    ABSENT,
    RECEIPT,
    SET_ASIDE,
    UNFINISHED,
    Entry,
    Found,
    Receipt,
    serialise_receipt,
)
from vmprovision.errors import PlanError
from vmprovision.filesystem.protocol import PERMISSIONS, check_size
from vmprovision.selinux.labelling import AUTORELABEL, find_labels, request_relabelling

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import PurePosixPath

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import GuestInfo, InstalledAgent


def survey(paths: Iterable[PurePosixPath], reader: GuestReader) -> dict[PurePosixPath, Found]:
    """Read what is at these guest paths now, contents included.

    Raises:
        InspectionError: a path cannot be read, or is too large to be set aside.
        PlanError: a device, pipe or socket, which cannot be restored, is at a path.
    """
    return {path: look_at(path, reader) for path in paths}


def look_at(path: PurePosixPath, reader: GuestReader) -> Found:
    """Read what is at one guest path now, including its content."""
    status = reader.lstat(path)
    if status is None:
        return ABSENT
    if status.kind == "other":
        raise PlanError(
            f"guest path {path} is a device, pipe or socket", hint="move it out of the way"
        )
    content = None
    if status.kind == "file":
        status, content = reader.load(path, limit=FILE_LIMIT + 1)
        check_size(path, len(content), FILE_LIMIT)
    return Found(
        kind=status.kind,
        mode=status.mode,
        uid=status.uid,
        gid=status.gid,
        label=reader.label(path),
        target=reader.readlink(path) if status.kind == "symlink" else None,
        sha256=digest(content) if content is not None else None,
        content=content,
    )


def notes_on_names(plan: Plan, reader: GuestReader) -> list[str]:
    """Return a note for each file to be changed that has other hard links, which stay unchanged.

    ``cp -al`` makes such links, also to a file of the host.
    """
    found = []
    for operation in plan.operations:
        status = reader.lstat(operation.path)
        if status is None or status.kind != "file" or status.links < 2:  # noqa: PLR2004 -- names
            continue
        if not is_satisfied(operation, reader):
            found.append(
                f"guest path {operation.path} has other hard links: "
                "they keep the old content and are separate files from now on"
            )
    return found


def with_receipt(
    plan: Plan, guest: GuestInfo, found: Mapping[PurePosixPath, Found], agent_version: str
) -> Plan:
    """Return the plan with set-aside copies, restorations, labels and the receipt.

    Existing directories are left out, unless an earlier injection made them.  Paths of an
    earlier injection that this one does not write to are restored first.  All new files
    get their SELinux label.  The enabling operation stays last.
    """
    earlier = guest.agent.receipt if guest.agent else None
    folder = guest.real_path(SET_ASIDE)
    wanted = [operation for operation in plan.operations if _is_wanted(operation, earlier, found)]
    before = {o.path: _before(o.path, folder, earlier, found) for o in wanted}
    copies = {
        kept: WriteFile(path=kept, content=content, mode=0o600)
        for path, what in before.items()
        if (kept := what.kept) and (content := _copied(what, found, (path, kept))) is not None
    }
    made = MakeDirectory(path=folder, mode=0o700)
    own = WriteFile(path=guest.real_path(RECEIPT), content=b"", mode=0o600)
    labels = find_labels(guest.selinux, [*wanted, made, *copies.values(), own], found)
    requests, notes = request_relabelling(guest.selinux, labels, wanted, found)

    entries = [Entry(condition=labels.recorded(o), before=before[o.path]) for o in wanted]
    aside = [
        Entry(condition=labels.recorded(copies[kept]), before=ABSENT)
        for kept in dict.fromkeys(what.kept for what in before.values())
        if kept in copies
    ]
    folders = [made] if aside else []
    aside += [Entry(condition=labels.recorded(o), before=ABSENT) for o in folders]
    if requests or (labels.obstacle and earlier and earlier.entry_for(AUTORELABEL)):
        aside.append(Entry(condition=RequestCondition(path=AUTORELABEL), before=ABSENT))
    receipt = Receipt(
        agent_version=agent_version, init=str(guest.init.system), entries=(*aside, *entries)
    )
    written = replace(own, content=serialise_receipt(receipt))
    earlier_ones = _stale_entries(earlier, receipt)
    intent = replace(receipt, entries=(*earlier_ones, *receipt.entries))
    directories = [operation for operation in wanted if isinstance(operation, MakeDirectory)]
    rest = [operation for operation in wanted if not isinstance(operation, MakeDirectory)]
    stale = restorations(earlier_ones, found)
    first: list[Operation] = [*directories, *folders, *copies.values()]
    operations = [labels.give(operation) for operation in first]
    operations += [*stale, *requests]
    operations += [labels.give(o) for o in (*rest[:-1], written, *rest[-1:])]
    notes += _notes_on_modes(wanted, earlier, found)
    return Plan(
        operations=(*operations, *finishing(guest.agent)),
        notes=(*plan.notes, *notes),
        intent=serialise_receipt(intent),
    )


def finishing(agent: InstalledAgent | None) -> list[Operation]:
    """Return the last operation of a plan that completes an interrupted change."""
    return [Remove(path=UNFINISHED)] if agent and agent.unfinished else []


def _copied(
    before: Found, found: Mapping[PurePosixPath, Found], places: Iterable[PurePosixPath]
) -> bytes | None:
    """Return the content of a file to set aside, or set aside before, if it has this hash."""
    for path in places:
        what = found.get(path, ABSENT)
        if what.sha256 == before.sha256 and what.content is not None:
            return what.content
    return None


def _is_wanted(
    operation: Operation, earlier: Receipt | None, found: Mapping[PurePosixPath, Found]
) -> bool:
    if not isinstance(operation, MakeDirectory):
        return True
    ours = earlier is not None and earlier.entry_for(operation.path) is not None
    return ours or found[operation.path].kind != "directory"


def _before(
    path: PurePosixPath,
    folder: PurePosixPath,
    earlier: Receipt | None,
    found: Mapping[PurePosixPath, Found],
) -> Found:
    """Return what was at a path before the *first* injection, and where the copy is."""
    entry = earlier.entry_for(path) if earlier else None
    if entry is None:
        return set_aside(found[path], folder)
    _refuse_forgeable(entry)
    return entry.before


def set_aside(found: Found, folder: PurePosixPath) -> Found:
    """Return the same record with the path of its copy: its hash as a name in this folder.

    A receipt has no set-user-ID, set-group-ID or sticky bits, because they are never
    trusted.
    """
    if found.sha256 is None or found.mode is None:
        return found
    return replace(found, kept=folder / found.sha256, mode=found.mode & PERMISSIONS)


def _notes_on_modes(
    operations: Iterable[Operation],
    earlier: Receipt | None,
    found: Mapping[PurePosixPath, Found],
) -> list[str]:
    """Return a note for each file whose special mode bits are not kept."""
    return [
        f"guest path {path} has mode {what.mode:04o}: `remove` restores it "
        "without its set-user-ID, set-group-ID and sticky bits"
        for path, what in ((o.path, found[o.path]) for o in operations)
        if what.kind == "file" and what.mode is not None and what.mode & ~PERMISSIONS
        if earlier is None or earlier.entry_for(path) is None
    ]


def _stale_entries(earlier: Receipt | None, receipt: Receipt) -> list[Entry]:
    """Return the earlier receipt's entries for paths that the new receipt does not name."""
    if earlier is None:
        return []
    now = {entry.condition.path for entry in receipt.entries}
    return [entry for entry in earlier.entries if entry.condition.path not in now]


def restorations(entries: Iterable[Entry], found: Mapping[PurePosixPath, Found]) -> list[Operation]:
    """Return the operations that restore these paths: last path first, directories at the end.

    Args:
        entries: a receipt's entries, in its order.
        found: a survey of their paths, including the set-aside copies.

    Raises:
        PlanError: a set-aside copy is gone or was changed.
    """
    order = list(reversed(list(entries)))
    files = [entry for entry in order if entry.condition.kind != "directory"]
    # the copies are removed after the originals are restored
    copies = {entry.before.kept for entry in order}
    files.sort(key=lambda entry: entry.condition.path in copies)
    directories = [entry for entry in order if entry.condition.kind == "directory"]
    directories.sort(key=lambda entry: len(entry.condition.path.parts), reverse=True)
    return [
        operation
        for entry in (*files, *directories)
        for operation in restoration(entry, found.get(entry.condition.path, ABSENT), found)
    ]


def restoration(entry: Entry, now: Found, found: Mapping[PurePosixPath, Found]) -> list[Operation]:
    """Return the operations that restore one path; none if it is already as before.

    Args:
        entry: the path's entry in the receipt.
        now: what is there now.
        found: a survey that holds the path and the set-aside files.

    Raises:
        PlanError: the set-aside copy is gone or was changed.
    """
    path, before = entry.condition.path, entry.before
    if before.kind == "directory" or (before.kind != "absent" and _is_as_before(now, before)):
        return []
    block = entry.condition
    if isinstance(block, BlockCondition) and _has_other_lines(block.name, before, now):
        return [EditBlock(path=path, name=block.name, content=b"")]
    if before.kind == "absent":
        return [Remove(path=path)]
    _refuse_forgeable(entry)
    uid, gid = before.uid or 0, before.gid or 0
    if before.kind == "symlink":
        target = before.target or ""
        return [Symlink(path=path, target=target, uid=uid, gid=gid, label=before.label)]
    places = [place for place in (before.kept, path) if place]
    content, mode = _copied(before, found, places), before.mode or 0
    if content is None:
        raise PlanError(
            f"guest path {path} cannot be restored: its copy "
            f"{before.kept} is missing or was changed",
            hint="restore the image from its own backup",
        )
    return [WriteFile(path=path, content=content, mode=mode, uid=uid, gid=gid, label=before.label)]


def _has_other_lines(block: str, before: Found, now: Found) -> bool:
    """Return whether a file with the agent's block has other lines, which must stay."""
    if now.content is None:
        return False
    bare = strip_blocks(block, now.content)
    if before.kind == "absent":
        return not _is_ours_alone(bare)
    if before.kind != "file":
        return False
    return not before.believed or not _same_lines(bare, before)


def _is_as_before(now: Found, before: Found) -> bool:
    """Return whether a path is as the receipt describes it before the injection."""

    def compared(what: Found) -> Found:
        mode = what.mode if what.mode is None else what.mode & PERMISSIONS
        label = what.label if before.label is not None else None
        return replace(what, mode=mode, label=label, content=None, kept=None, believed=True)

    return compared(now) == compared(before)


def _refuse_forgeable(entry: Entry) -> None:
    """Refuse to restore, into root's directory, what a user other than root could have forged.

    Raises:
        PlanError: the receipt asks for that at this path.
    """
    if not entry.before.believed:
        raise PlanError(
            f"guest path {entry.condition.path} is not restored: "
            "users other than root can write the receipt, but not that directory",
            hint=f"make root the owner of {RECEIPT.parent} and the directories above it, "
            "if no other user could change them so far",
        )


def _is_ours_alone(bare: bytes) -> bool:
    """Return whether a file has nothing but the prologue of the agent's block."""
    lines = [line for line in bare.splitlines() if line.strip()]
    return all(line.startswith(b"#!") for line in lines) and len(lines) <= 1


def _same_lines(bare: bytes, before: Found) -> bool:
    return before.sha256 in (digest(bare), digest(bare.removesuffix(b"\n")))
