"""The operations of a plan: each states an end condition, not how to reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.changes.blocks import marked
from vmprovision.changes.conditions import (
    AbsentCondition,
    BlockCondition,
    DirectoryCondition,
    FileCondition,
    SymlinkCondition,
    digest,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import PurePosixPath

    from vmprovision.filesystem.protocol import GuestReader

EDIT_LIMIT = 4 << 20  # bytes; no file whose lines are edited is larger


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeDirectory:
    """A directory is at path; an existing one keeps its mode and owner."""

    path: PurePosixPath
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    label: str | None = None

    @property
    def condition(self) -> DirectoryCondition:
        """The end condition."""
        return DirectoryCondition(path=self.path, label=self.label)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteFile:
    """A regular file with exactly this content, mode and owner is at path."""

    path: PurePosixPath
    content: bytes
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    label: str | None = None

    @property
    def condition(self) -> FileCondition:
        """The end condition."""
        return FileCondition(
            path=self.path,
            mode=self.mode,
            uid=self.uid,
            gid=self.gid,
            sha256=digest(self.content),
            label=self.label,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Symlink:
    """A symbolic link with exactly this target is at path."""

    path: PurePosixPath
    target: str
    uid: int = 0
    gid: int = 0
    label: str | None = None

    @property
    def condition(self) -> SymlinkCondition:
        """The end condition."""
        return SymlinkCondition(path=self.path, target=self.target, label=self.label)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditBlock:
    """The file at path holds these lines once, between markers that name them.

    The rest of the file stays unchanged.  Empty ``content`` means that the block is not
    there.

    Attributes:
        content: whole lines, each ended by a line feed, without the markers.
        before: put the block before the last line with this command (with or without one
            argument and a comment), or at the end of the file if there is no such line.
        prologue: the beginning of a file that does not exist yet.
        mode: permission bits that are added to the file's own.
        label: the SELinux label of a file that does not exist yet; others keep theirs.
    """

    path: PurePosixPath
    name: str
    content: bytes
    before: str | None = None
    prologue: bytes = b""
    mode: int = 0
    label: str | None = None

    @property
    def condition(self) -> BlockCondition:
        """The end condition."""
        wanted = marked(self.name, self.content) if self.content else b""
        return BlockCondition(path=self.path, mode=self.mode, sha256=digest(wanted), name=self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Remove:
    """Nothing is at path, except for a directory that still holds other files."""

    path: PurePosixPath

    @property
    def condition(self) -> AbsentCondition:
        """The end condition."""
        return AbsentCondition(path=self.path)


Operation = MakeDirectory | WriteFile | Symlink | EditBlock | Remove


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Ordered operations; the one that enables the service is last.

    Attributes:
        intent: for a guest without a redo log, a receipt of all that may have changed while
            the plan is being applied.
    """

    operations: tuple[Operation, ...]
    notes: tuple[str, ...] = ()
    intent: bytes = b""

    @property
    def paths(self) -> tuple[PurePosixPath, ...]:
        """Every guest path of the plan, in order."""
        return tuple(operation.path for operation in self.operations)


def is_satisfied(operation: Operation, reader: GuestReader) -> bool:
    """Return whether the guest already meets the operation's end condition."""
    return not operation.condition.mismatches(reader)


def describe(operation: Operation) -> dict[str, Any]:
    """Return an operation for JSON: kind, path and end condition, content as size and hash."""
    described: dict[str, Any] = {
        "operation": type(operation).__name__,
        "path": str(operation.path),
    }
    if isinstance(operation, (MakeDirectory, WriteFile)):
        described |= {
            "mode": f"{operation.mode:04o}",
            "uid": operation.uid,
            "gid": operation.gid,
        }
    if isinstance(operation, (WriteFile, EditBlock)):
        described |= {"size": len(operation.content), "sha256": digest(operation.content)}
    if isinstance(operation, Symlink):
        described["target"] = operation.target
    if not isinstance(operation, Remove) and operation.label is not None:
        described["label"] = operation.label
    if isinstance(operation, EditBlock):
        described |= {"block": operation.name, "adds_mode": f"{operation.mode:04o}"}
    return described


def directories_for(paths: Iterable[PurePosixPath]) -> list[MakeDirectory]:
    """Return operations that make all parents of these paths except ``/``, outermost first."""
    parents = {parent for path in paths for parent in path.parents if parent.name}
    return [MakeDirectory(path=path) for path in sorted(parents, key=lambda p: (len(p.parts), p))]
