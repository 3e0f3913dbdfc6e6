"""End conditions: what must hold at one guest path, one class for each kind.

A condition stores a hash instead of content, so it fits into a receipt. Its one method,
``mismatches``, serves apply (skip what is met), verify (require), dry run (show the
difference) and the receipt in the guest.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vmprovision.changes.blocks import find_blocks

if TYPE_CHECKING:
    from pathlib import PurePosixPath

    from vmprovision.filesystem.protocol import FileStatus, GuestReader

ConditionKind = Literal["directory", "file", "symlink", "block", "request", "absent"]
FILE_LIMIT = 64 << 20  # no file that an injection writes or sets aside is larger


def digest(content: bytes) -> str:
    """Return the SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


NO_BLOCK = digest(b"")  # the hash for a block that must not be there


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryCondition:
    """A directory is at path.

    Attributes:
        label: its SELinux label, or None if any is accepted.
    """

    kind: ClassVar[ConditionKind] = "directory"
    path: PurePosixPath
    label: str | None = None

    def mismatches(self, reader: GuestReader) -> list[str]:
        """Return each difference as a sentence that begins with the guest path."""
        found = _look(self.path, "directory", reader)
        return [found] if isinstance(found, str) else _label(self.path, self.label, reader)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCondition:
    """A regular file with this content, mode and owner is at path.

    Attributes:
        mode: permission bits, or None if any are accepted; so for uid and gid.
        sha256: the hash of its content; an empty one matches no file.
        label: its SELinux label, or None if any is accepted.
    """

    kind: ClassVar[ConditionKind] = "file"
    path: PurePosixPath
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    sha256: str | None = None
    label: str | None = None

    def mismatches(self, reader: GuestReader) -> list[str]:
        """Return each difference as a sentence that begins with the guest path."""
        found = _look(self.path, "file", reader)
        if isinstance(found, str):
            return [found]
        return [
            *self._ownership(found),
            *self._content(found, reader),
            *_label(self.path, self.label, reader),
        ]

    def _ownership(self, status: FileStatus) -> list[str]:
        found = []
        if self.mode is not None and status.mode != self.mode:
            found.append(f"{self.path}: mode {status.mode:04o}, should be {self.mode:04o}")
        if self.uid is not None and (status.uid, status.gid) != (self.uid, self.gid):
            owner = f"{status.uid}:{status.gid}"
            found.append(f"{self.path}: owner {owner}, should be {self.uid}:{self.gid}")
        return found

    def _content(self, status: FileStatus, reader: GuestReader) -> list[str]:
        if status.size > FILE_LIMIT:
            return [_too_large(self.path, status)]
        content = reader.read(self.path, limit=FILE_LIMIT)
        return [] if digest(content) == self.sha256 else [f"{self.path}: content differs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SymlinkCondition:
    """A symbolic link with this target is at path.

    Attributes:
        label: its SELinux label, or None if any is accepted.
    """

    kind: ClassVar[ConditionKind] = "symlink"
    path: PurePosixPath
    target: str
    label: str | None = None

    def mismatches(self, reader: GuestReader) -> list[str]:
        """Return each difference as a sentence that begins with the guest path."""
        status = _look(self.path, "symlink", reader)
        if isinstance(status, str):
            return [status]
        target = reader.readlink(self.path)
        found = []
        if target != self.target:
            found.append(f"{self.path}: leads to {target}, should lead to {self.target}")
        return found + _label(self.path, self.label, reader)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCondition:
    """A file with this block of lines in it, once, is at path; or no file has the block.

    Attributes:
        name: the block's name in its markers.
        mode: permission bits that must be set; others may be set too.
        sha256: the hash of the block's lines with their markers; ``NO_BLOCK`` if the block
            must not be there.
    """

    kind: ClassVar[ConditionKind] = "block"
    path: PurePosixPath
    name: str
    mode: int
    sha256: str

    def mismatches(self, reader: GuestReader) -> list[str]:
        """Return each difference as a sentence that begins with the guest path."""
        if self.sha256 == NO_BLOCK and reader.lstat(self.path) is None:
            return []
        status = _look(self.path, "file", reader)
        if isinstance(status, str):
            return [status]
        found = []
        if status.mode & self.mode != self.mode:
            found.append(f"{self.path}: mode {status.mode:04o} lacks {self.mode:04o}")
        if status.size > FILE_LIMIT:
            return [*found, _too_large(self.path, status)]
        return found + self._content(reader.read(self.path, limit=FILE_LIMIT))

    def _content(self, content: bytes) -> list[str]:
        path, name = self.path, self.name
        blocks = find_blocks(name, content)
        if self.sha256 == NO_BLOCK:
            return [f"{path}: still holds the block {name}"] if blocks else []
        if len(blocks) != 1:
            return [f"{path}: holds the block {name} {len(blocks)} times, should be once"]
        start, end = blocks[0]
        same = digest(content[start:end]) == self.sha256
        return [] if same else [f"{path}: the lines of the block {name} differ"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCondition:
    """A file that asks the guest for something; the guest removes it afterwards.

    So any state of the path is accepted.
    """

    kind: ClassVar[ConditionKind] = "request"
    path: PurePosixPath

    def mismatches(self, reader: GuestReader) -> list[str]:  # noqa: ARG002 -- as the other kinds have it
        """Return nothing: no state of the guest is wrong."""
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsentCondition:
    """Nothing is at path, except for a directory that holds other files."""

    kind: ClassVar[ConditionKind] = "absent"
    path: PurePosixPath

    def mismatches(self, reader: GuestReader) -> list[str]:
        """Return the difference as a sentence that begins with the guest path."""
        status = reader.lstat(self.path)
        if status is None or (status.kind == "directory" and reader.list_directory(self.path)):
            return []
        return [f"{self.path}: is a {status.kind}, should not exist"]


Condition = (
    DirectoryCondition
    | FileCondition
    | SymlinkCondition
    | BlockCondition
    | RequestCondition
    | AbsentCondition
)


def _look(path: PurePosixPath, kind: str, reader: GuestReader) -> FileStatus | str:
    """Return the status of the file at path, or a sentence if it is not of this kind."""
    status = reader.lstat(path)
    if status is None:
        return f"{path}: missing"
    if status.kind != kind:
        return f"{path}: is a {status.kind}, should be a {kind}"
    return status


def _label(path: PurePosixPath, wanted: str | None, reader: GuestReader) -> list[str]:
    if wanted is None:
        return []
    label = reader.label(path)
    return [] if label == wanted else [f"{path}: label {label or 'missing'}, should be {wanted}"]


def _too_large(path: PurePosixPath, status: FileStatus) -> str:
    return f"{path}: {status.size} bytes, too large to be from an injection"
