"""The operations of a plan: each states an end condition, none says how to reach it.

A condition can be written down without the content it is about (only its hash),
so one function, ``mismatches``, serves apply (skip what is satisfied), verify
(assert), dry-run (difference) and the receipt in the guest.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import PurePosixPath

    from vmprovision.filesystem.protocol import FileStatus, GuestReader

ConditionKind = Literal["directory", "file", "symlink", "block", "request", "absent"]
FILE_LIMIT = 64 << 20  # nothing that we put into a guest, or set aside there, is larger
EDIT_LIMIT = 4 << 20  # nor is a file whose lines are edited


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What must be true of one guest path, in a form that fits into a receipt.

    Attributes:
        kind: ``directory`` (there is one), ``file`` (with this hash), ``symlink``
            (to this target), ``block`` (a file with this block of lines in it,
            once), ``request`` (a file that the guest takes away when it has done
            what it asks for, so whatever is there is right), ``absent`` (nothing is
            there, or a directory that others fill).
        mode: permission bits; for ``block`` those that must be set at least;
            None where any will do.
        sha256: of a file's content, or of a block's lines with their markers.
        name: of a block, as it stands in its markers.
        label: the SELinux label; None where any will do.
    """

    path: PurePosixPath
    kind: ConditionKind
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    sha256: str | None = None
    target: str | None = None
    name: str | None = None
    label: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeDirectory:
    """A directory is at path; one that is there already keeps its mode and owner."""

    path: PurePosixPath
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    label: str | None = None

    @property
    def condition(self) -> Condition:
        """The end condition."""
        return Condition(path=self.path, kind="directory", label=self.label)


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
    def condition(self) -> Condition:
        """The end condition."""
        return Condition(
            path=self.path,
            kind="file",
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
    def condition(self) -> Condition:
        """The end condition."""
        return Condition(path=self.path, kind="symlink", target=self.target, label=self.label)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditBlock:
    """The file at path holds these lines once, between markers that name them.

    The rest of the file is not touched.  ``content`` empty means that the block
    is not there.

    Attributes:
        content: whole lines, each ended by a line feed, without the markers.
        before: the block goes before the last line that is this command, with or
            without one argument and a comment, where there is such a line; otherwise
            to the end of the file.
        prologue: what a file that is not there yet begins with.
        mode: permission bits that are set besides those the file has.
        label: the SELinux label of a file that is not there yet; others keep theirs.
    """

    path: PurePosixPath
    name: str
    content: bytes
    before: str | None = None
    prologue: bytes = b""
    mode: int = 0
    label: str | None = None

    @property
    def condition(self) -> Condition:
        """The end condition."""
        wanted = marked(self.name, self.content) if self.content else b""
        return Condition(
            path=self.path, kind="block", mode=self.mode, sha256=digest(wanted), name=self.name
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Remove:
    """Nothing is at path, or a directory that still holds what others put there."""

    path: PurePosixPath

    @property
    def condition(self) -> Condition:
        """The end condition."""
        return Condition(path=self.path, kind="absent")


Operation = MakeDirectory | WriteFile | Symlink | EditBlock | Remove


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Ordered operations; the one that enables the service is last.

    Attributes:
        intent: a receipt of all that may have changed until the plan is carried out, for a
            guest that has no redo log.
    """

    operations: tuple[Operation, ...]
    notes: tuple[str, ...] = ()
    intent: bytes = b""

    @property
    def paths(self) -> tuple[PurePosixPath, ...]:
        """Every guest path that the plan is about, in order."""
        return tuple(operation.path for operation in self.operations)


def digest(content: bytes) -> str:
    """Return the SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def is_satisfied(operation: Operation, reader: GuestReader) -> bool:
    """Return whether the guest already meets the operation's end condition."""
    return not mismatches(operation.condition, reader)


def mismatches(condition: Condition, reader: GuestReader) -> list[str]:
    """Return each difference between guest and condition as a sentence, guest path first."""
    if condition.kind == "request":
        return []
    path = condition.path
    status = reader.lstat(path)
    if status is None or condition.kind == "absent":
        return _presence(condition, status, reader)
    expected = "file" if condition.kind == "block" else condition.kind
    if status.kind != expected:
        return [f"{path}: a {status.kind} is there, should be a {expected}"]
    found = _ownership(condition, status)
    if condition.kind == "symlink":
        target = reader.readlink(path)
        if target != condition.target:
            found.append(f"{path}: leads to {target}, should lead to {condition.target}")
    elif condition.kind in ("file", "block"):
        found += _content(condition, status, reader)
    return found + _label(condition, reader)


def _presence(condition: Condition, status: FileStatus | None, reader: GuestReader) -> list[str]:
    path = condition.path
    if status is None:
        no_block = condition.kind == "block" and condition.sha256 == digest(b"")
        return [] if no_block or condition.kind == "absent" else [f"{path}: missing"]
    if status.kind == "directory" and reader.list_directory(path):
        return []
    return [f"{path}: a {status.kind} is there, nothing should be"]


def _label(condition: Condition, reader: GuestReader) -> list[str]:
    if condition.label is None:
        return []
    label = reader.label(condition.path)
    if label == condition.label:
        return []
    return [f"{condition.path}: label {label or 'missing'}, should be {condition.label}"]


def _ownership(condition: Condition, status: FileStatus) -> list[str]:
    found = []
    path = condition.path
    if condition.kind == "block" and condition.mode is not None:
        if status.mode & condition.mode != condition.mode:
            found.append(f"{path}: mode {status.mode:04o} lacks {condition.mode:04o}")
    elif condition.mode is not None and status.mode != condition.mode:
        found.append(f"{path}: mode {status.mode:04o}, should be {condition.mode:04o}")
    owner, wanted = (status.uid, status.gid), (condition.uid, condition.gid)
    if condition.uid is not None and owner != wanted:
        found.append(f"{path}: owner {owner[0]}:{owner[1]}, should be {wanted[0]}:{wanted[1]}")
    return found


def _content(condition: Condition, status: FileStatus, reader: GuestReader) -> list[str]:
    path = condition.path
    if status.size > FILE_LIMIT:
        return [f"{path}: {status.size} bytes, too large to be ours"]
    content = reader.read(path, limit=FILE_LIMIT)
    if condition.kind == "file":
        return [] if digest(content) == condition.sha256 else [f"{path}: content differs"]
    name = condition.name or ""
    blocks = find_blocks(name, content)
    if condition.sha256 == digest(b""):
        return [f"{path}: still holds the block {name}"] if blocks else []
    if len(blocks) != 1:
        return [f"{path}: holds the block {name} {len(blocks)} times, should be once"]
    start, end = blocks[0]
    same = digest(content[start:end]) == condition.sha256
    return [] if same else [f"{path}: the lines of the block {name} differ"]


def marked(name: str, content: bytes) -> bytes:
    """Return the lines of a block between its two markers."""
    begin, end = _markers(name)
    return begin + content + end


def find_blocks(name: str, content: bytes) -> list[tuple[int, int]]:
    """Return the blocks of this name in a file as (start, end) offsets, markers included.

    A begin marker without an end marker is a block up to the next begin marker
    or the end of its own line: somebody cut it, and it is not ours to widen.
    """
    begin, end = _markers(name)
    starts, stops = _line_offsets(content, begin), _line_offsets(content, end)
    found = []
    stop = next(stops, None)
    for start, following in pairwise([*starts, len(content)]):
        after = start + len(begin)
        while stop is not None and stop < after:
            stop = next(stops, None)
        whole = stop is not None and stop < following
        found.append((start, stop + len(end) if whole and stop is not None else after))
    return found


def insert_block(edit: EditBlock, content: bytes) -> bytes:
    """Return a file's content with the block in it once, where the operation wants it."""
    bare = strip_blocks(edit.name, content)
    if not edit.content:
        return bare
    block = marked(edit.name, edit.content)
    lines = bare.splitlines(keepends=True)
    places = [index for index, line in enumerate(lines) if _is_command(line, edit.before)]
    place = places[-1] if places else len(lines)
    head, tail = b"".join(lines[:place]), b"".join(lines[place:])
    if head and not head.endswith(b"\n"):
        head += b"\n"
    return head + block + tail


def _is_command(line: bytes, command: str | None) -> bool:
    """Return whether a script's line is this command, and no part of something that is indented."""
    words = line.split(b"#")[0].replace(b";", b" ").split()
    wanted = (command or "").encode()
    return words[:1] == [wanted] and not words[2:] and line.startswith(wanted)


def strip_blocks(name: str, content: bytes) -> bytes:
    """Return a file's content without any block of this name."""
    left, position = [], 0
    for start, end in find_blocks(name, content):
        left.append(content[position:start])
        position = end
    return b"".join([*left, content[position:]])


def _markers(name: str) -> tuple[bytes, bytes]:
    return (
        f"# BEGIN {name} (added by vmprovision; remove it with `vmprovision remove`)\n".encode(),
        f"# END {name}\n".encode(),
    )


def _line_offsets(content: bytes, line: bytes) -> Iterator[int]:
    """Yield each offset at which this line is a line of its own."""
    position = -1
    while (position := content.find(line, position + 1)) >= 0:
        if position == 0 or content[position - 1 : position] == b"\n":
            yield position


def describe(operation: Operation) -> dict[str, Any]:
    """Return an operation for JSON: kind, path and end condition, the content as size and hash."""
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
    """Return the operations that make all parents of these paths, outermost first, but ``/``."""
    parents = {parent for path in paths for parent in path.parents if parent.name}
    return [MakeDirectory(path=path) for path in sorted(parents, key=lambda p: (len(p.parts), p))]
