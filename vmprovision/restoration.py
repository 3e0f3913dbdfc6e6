"""What stood in a guest before: looked at, set aside in the guest, and brought back.

An injection keeps a copy of every file that it replaces or edits under
``set-aside/``, so that ``remove`` restores it to the byte, also years later and
on another host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmprovision.errors import PlanError
from vmprovision.filesystem import read_all
from vmprovision.plan import (
    FILE_LIMIT,
    EditBlock,
    MakeDirectory,
    Operation,
    Plan,
    Remove,
    Symlink,
    WriteFile,
    digest,
    strip_blocks,
)
from vmprovision.receipt import (
    ABSENT,
    RECEIPT,
    SET_ASIDE,
    Entry,
    Found,
    Receipt,
    serialise_receipt,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import PurePosixPath

    from vmprovision.filesystem import GuestReader
    from vmprovision.guest import GuestInfo


def survey(paths: Iterable[PurePosixPath], reader: GuestReader) -> dict[PurePosixPath, Found]:
    """What stands at these guest paths now, contents included.

    Raises:
        InspectionError: a path cannot be read, or holds more than we would set aside.
        PlanError: something stands there that can be neither kept nor restored.
    """
    return {path: look_at(path, reader) for path in paths}


def look_at(path: PurePosixPath, reader: GuestReader) -> Found:
    """What stands at one guest path now, its content included."""
    status = reader.lstat(path)
    if status is None:
        return ABSENT
    if status.kind == "other":
        raise PlanError(
            f"guest path {path} is a device, pipe or socket", hint="move it out of the way"
        )
    content = read_all(reader, path, FILE_LIMIT) if status.kind == "file" else None
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


def set_aside_path(found: Found) -> PurePosixPath:
    """Where the content of a file that stood in our way is kept in the guest."""
    return SET_ASIDE / str(found.sha256)


def with_receipt(
    plan: Plan, guest: GuestInfo, found: Mapping[PurePosixPath, Found], agent_version: str
) -> Plan:
    """The plan completed for a guest in which this was found: set aside, restore, receipt.

    Directories that are there already and not by us are left out.  What an
    earlier injection put where this one puts nothing is restored first.  The
    enabling operation stays last.
    """
    earlier = guest.agent.receipt if guest.agent else None
    wanted = [operation for operation in plan.operations if _is_wanted(operation, earlier, found)]
    entries = [
        Entry(condition=operation.condition, before=_before(operation.path, earlier, found))
        for operation in wanted
    ]
    kept = [
        WriteFile(
            path=set_aside_path(entry.before),
            content=entry.before.content,
            mode=0o600,
        )
        for entry in entries
        if entry.before.content is not None
    ]
    kept = list({operation.path: operation for operation in kept}.values())
    aside = [Entry(condition=operation.condition, before=ABSENT) for operation in kept]
    aside += _kept_entries(earlier, [*entries, *aside])
    folder = MakeDirectory(path=SET_ASIDE, mode=0o700)
    folders = [folder] if aside else []
    aside += [Entry(condition=folder.condition, before=ABSENT) for folder in folders]
    receipt = Receipt(
        agent_version=agent_version, init=str(guest.init.system), entries=(*aside, *entries)
    )
    directories = [operation for operation in wanted if isinstance(operation, MakeDirectory)]
    rest = [operation for operation in wanted if not isinstance(operation, MakeDirectory)]
    written = WriteFile(path=RECEIPT, content=serialise_receipt(receipt), mode=0o600)
    restored = restorations(_stale_entries(earlier, receipt), found)
    return Plan(
        operations=(*directories, *folders, *kept, *restored, *rest[:-1], written, *rest[-1:]),
        notes=plan.notes,
    )


def _is_wanted(
    operation: Operation, earlier: Receipt | None, found: Mapping[PurePosixPath, Found]
) -> bool:
    if not isinstance(operation, MakeDirectory):
        return True
    ours = earlier is not None and earlier.entry_for(operation.path) is not None
    return ours or found[operation.path].kind != "directory"


def _before(
    path: PurePosixPath, earlier: Receipt | None, found: Mapping[PurePosixPath, Found]
) -> Found:
    """What stood at a path before the *first* injection."""
    entry = earlier.entry_for(path) if earlier else None
    return entry.before if entry else found[path]


def _stale_entries(earlier: Receipt | None, receipt: Receipt) -> list[Entry]:
    """What the earlier injection put where this one puts nothing."""
    if earlier is None:
        return []
    now = {entry.condition.path for entry in receipt.entries}
    return [entry for entry in earlier.entries if entry.condition.path not in now]


def _kept_entries(earlier: Receipt | None, entries: list[Entry]) -> list[Entry]:
    """The earlier injection's set-aside files that are still somebody's only copy."""
    if earlier is None:
        return []
    now = {entry.condition.path for entry in entries}
    needed = {set_aside_path(entry.before) for entry in entries if entry.before.kind == "file"}
    return [entry for entry in earlier.entries if entry.condition.path in needed - now]


def restorations(entries: Iterable[Entry], found: Mapping[PurePosixPath, Found]) -> list[Operation]:
    """What brings back all that stood at these entries' paths: last first, directories at the end.

    Args:
        entries: of a receipt, in its order.
        found: a survey of their paths, so also of the files that were set aside.

    Raises:
        PlanError: something that was set aside is gone or was changed.
    """
    order = list(reversed(list(entries)))
    files = [entry for entry in order if entry.condition.kind != "directory"]
    # the copies go when everything that they are copies of has been brought back
    files.sort(key=lambda entry: entry.condition.path.parent == SET_ASIDE)
    directories = [entry for entry in order if entry.condition.kind == "directory"]
    directories.sort(key=lambda entry: len(entry.condition.path.parts), reverse=True)
    return [
        operation
        for entry in (*files, *directories)
        for operation in restoration(entry, found.get(entry.condition.path, ABSENT), found)
    ]


def restoration(entry: Entry, now: Found, found: Mapping[PurePosixPath, Found]) -> list[Operation]:
    """What brings back what stood at a path before; nothing where all is as it was.

    Args:
        entry: the path's entry in the receipt.
        now: what stands there now.
        found: a survey that holds the set-aside files.

    Raises:
        PlanError: the set-aside content is gone or was changed.
    """
    path, before = entry.condition.path, entry.before
    if entry.condition.kind == "block" and now.kind == "file" and now.content is not None:
        bare = strip_blocks(entry.condition.name or "", now.content)
        if before.kind == "absent" and not _is_ours_alone(bare):
            return [EditBlock(path=path, name=entry.condition.name or "", content=b"")]
        if before.kind == "file" and not _same_lines(bare, before):
            # somebody edited the file after the injection: their lines stay
            return [EditBlock(path=path, name=entry.condition.name or "", content=b"")]
    if before.kind == "absent":
        return [Remove(path=path)]
    if before.kind == "symlink":
        return [
            Symlink(
                path=path,
                target=before.target or "",
                uid=before.uid or 0,
                gid=before.gid or 0,
                label=before.label,
            )
        ]
    if before.kind == "directory":
        return []
    kept = found.get(set_aside_path(before), ABSENT)
    if kept.sha256 != before.sha256 or kept.content is None:
        raise PlanError(
            f"what stood at guest path {path} cannot be restored: its copy "
            f"{set_aside_path(before)} is missing or was changed",
            hint="restore the image from its own backup",
        )
    return [
        WriteFile(
            path=path,
            content=kept.content,
            mode=before.mode or 0,
            uid=before.uid or 0,
            gid=before.gid or 0,
            label=before.label,
        )
    ]


def _is_ours_alone(bare: bytes) -> bool:
    """Whether nothing but the prologue that we began a file with is left of it."""
    lines = [line for line in bare.splitlines() if line.strip()]
    return all(line.startswith(b"#!") for line in lines) and len(lines) <= 1


def _same_lines(bare: bytes, before: Found) -> bool:
    return before.sha256 in (digest(bare), digest(bare.removesuffix(b"\n")))
