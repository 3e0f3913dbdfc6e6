"""Bring a guest to a plan's end conditions."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vmprovision.changes.blocks import insert_block
from vmprovision.changes.operations import (
    EDIT_LIMIT,
    EditBlock,
    MakeDirectory,
    Operation,
    Plan,
    Symlink,
    WriteFile,
    is_satisfied,
)
from vmprovision.errors import ApplyError
from vmprovision.filesystem.protocol import PERMISSIONS, Attributes, check_size

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestFilesystem
    from vmprovision.progress import Control

log = logging.getLogger(__name__)


def apply_plan(plan: Plan, filesystem: GuestFilesystem, control: Control) -> list[Operation]:
    """Carry out the operations in order; return those that changed something.

    Raises:
        ApplyError: an operation failed. The guest is partly written, so the caller discards
            the redo log.
    """
    applied = []
    for number, operation in enumerate(plan.operations):
        control.step("writing", number / len(plan.operations))
        if is_satisfied(operation, filesystem):
            continue
        log.info("%s %s", type(operation).__name__, operation.path)
        _apply(operation, filesystem)
        applied.append(operation)
    return applied


def _apply(operation: Operation, filesystem: GuestFilesystem) -> None:
    if isinstance(operation, MakeDirectory):
        _make_directory(operation, filesystem)
    elif isinstance(operation, WriteFile):
        _write_file(operation, filesystem)
    elif isinstance(operation, Symlink):
        _make_link(operation, filesystem)
    elif isinstance(operation, EditBlock):
        _edit_block(operation, filesystem)
    else:
        filesystem.remove(operation.path)


def _make_directory(operation: MakeDirectory, filesystem: GuestFilesystem) -> None:
    status = filesystem.lstat(operation.path)
    if status is None:
        filesystem.make_directory(operation.path, _attributes(operation))
    elif status.kind != "directory":
        raise ApplyError(
            f"guest path {operation.path} is a {status.kind}, but must be a directory",
            hint="move it out of the way in the guest",
        )
    elif operation.label is not None:
        filesystem.set_label(operation.path, operation.label)


def _write_file(operation: WriteFile, filesystem: GuestFilesystem) -> None:
    _refuse_directory(operation, filesystem)
    filesystem.write(operation.path, operation.content, _attributes(operation))


def _make_link(operation: Symlink, filesystem: GuestFilesystem) -> None:
    _refuse_directory(operation, filesystem)
    filesystem.symlink(
        operation.path,
        operation.target,
        Attributes(uid=operation.uid, gid=operation.gid, label=operation.label),
    )


def _attributes(operation: MakeDirectory | WriteFile) -> Attributes:
    return Attributes(
        mode=operation.mode, uid=operation.uid, gid=operation.gid, label=operation.label
    )


def _refuse_directory(operation: WriteFile | Symlink, filesystem: GuestFilesystem) -> None:
    status = filesystem.lstat(operation.path)
    if status is not None and status.kind == "directory":
        raise ApplyError(
            f"guest path {operation.path} is a directory, but must be a file or link",
            hint="move it out of the way in the guest",
        )


def _edit_block(operation: EditBlock, filesystem: GuestFilesystem) -> None:
    """Write the file again with the block in it, without set-user-ID: its content has changed."""
    path = operation.path
    status = filesystem.lstat(path)
    if status is None:
        made = Attributes(mode=0o644 | operation.mode, label=operation.label)
        filesystem.write(path, insert_block(operation, operation.prologue), made)
        return
    if status.kind != "file":
        raise ApplyError(f"guest path {path} is a {status.kind}, but must be a file")
    label = filesystem.label(path)
    status, content = filesystem.load(path, limit=EDIT_LIMIT + 1)
    check_size(path, len(content), EDIT_LIMIT)
    kept = Attributes(
        mode=status.mode & PERMISSIONS | operation.mode,
        uid=status.uid,
        gid=status.gid,
        label=label if label and filesystem.takes_labels() else None,
    )
    filesystem.write(path, insert_block(operation, content), kept)
