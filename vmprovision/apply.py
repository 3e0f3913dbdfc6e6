"""Bring a guest to a plan's end conditions: the only writer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vmprovision.errors import ApplyError
from vmprovision.plan import (
    EditBlock,
    MakeDirectory,
    Operation,
    Plan,
    Symlink,
    WriteFile,
    insert_block,
    is_satisfied,
)

if TYPE_CHECKING:
    from vmprovision.filesystem import GuestFilesystem
    from vmprovision.progress import Control

log = logging.getLogger(__name__)


def apply_plan(plan: Plan, filesystem: GuestFilesystem, control: Control) -> list[Operation]:
    """The operations that had something to do, done in the plan's order.

    Raises:
        ApplyError: one failed; the guest is half-written, and the caller throws
            the redo log away.
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
        filesystem.make_directory(operation.path)
        _give(operation, filesystem)
    elif status.kind != "directory":
        raise ApplyError(
            f"guest path {operation.path} is a {status.kind}, a directory is needed there",
            hint="move it out of the way in the guest",
        )
    _set_label(operation, filesystem)


def _write_file(operation: WriteFile, filesystem: GuestFilesystem) -> None:
    # a new file: what stands there may have other names, and attributes of its own
    _clear(operation, filesystem)
    filesystem.write(operation.path, operation.content)
    _give(operation, filesystem)
    _set_label(operation, filesystem)


def _give(operation: MakeDirectory | WriteFile, filesystem: GuestFilesystem) -> None:
    """Give what was just made its owner and mode, where it has not got them already.

    The owner first: changing it clears the set-user-id and set-group-id bits.
    """
    _give_owner(operation, filesystem)
    made = filesystem.lstat(operation.path)
    if made is None or made.mode != operation.mode:
        filesystem.set_mode(operation.path, operation.mode)


def _give_owner(
    operation: MakeDirectory | WriteFile | Symlink, filesystem: GuestFilesystem
) -> None:
    made = filesystem.lstat(operation.path)
    if made is None or (made.uid, made.gid) != (operation.uid, operation.gid):
        filesystem.set_owner(operation.path, operation.uid, operation.gid)


def _make_link(operation: Symlink, filesystem: GuestFilesystem) -> None:
    _clear(operation, filesystem)
    filesystem.symlink(operation.path, operation.target)
    _give_owner(operation, filesystem)
    _set_label(operation, filesystem)


def _set_label(
    operation: MakeDirectory | WriteFile | Symlink | EditBlock, filesystem: GuestFilesystem
) -> None:
    if operation.label is not None:
        filesystem.set_label(operation.path, operation.label)


def _clear(operation: WriteFile | Symlink, filesystem: GuestFilesystem) -> None:
    """Take away what stands at the path; never a directory."""
    status = filesystem.lstat(operation.path)
    if status is None:
        return
    if status.kind == "directory":
        raise ApplyError(
            f"guest path {operation.path} is a directory, something else is needed there",
            hint="move it out of the way in the guest",
        )
    filesystem.remove(operation.path)


def _edit_block(operation: EditBlock, filesystem: GuestFilesystem) -> None:
    status = filesystem.lstat(operation.path)
    if status is None:
        filesystem.write(operation.path, insert_block(operation, operation.prologue))
        filesystem.set_owner(operation.path, 0, 0)
        filesystem.set_mode(operation.path, 0o644 | operation.mode)
        _set_label(operation, filesystem)
        return
    if status.kind != "file":
        raise ApplyError(f"guest path {operation.path} is a {status.kind}, a file is needed there")
    content = filesystem.read(operation.path, limit=status.size + 1)
    filesystem.write(operation.path, insert_block(operation, content))
    filesystem.set_mode(operation.path, status.mode | operation.mode)
