"""The Protocols of a guest's filesystem, offline.

Inspection receives a ``GuestReader``, so mypy proves that it cannot write; apply
receives a ``GuestFilesystem``. Guest paths are absolute ``PurePosixPath``. A symbolic
link, relative or absolute, is followed inside the guest's root and never out of it.
``read`` also follows the *last* component of a path; the other methods do not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal, Protocol

from vmprovision.errors import (
    ApplyError,
    GuestSpaceError,
    InspectionError,
)
from vmprovision.filesystem.inroot import LINK_LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = PurePosixPath("/")
TEXT_LIMIT = 1 << 20
SELINUX = "security.selinux"  # the extended attribute that holds the label (xattr(7))
PERMISSIONS = 0o777  # permission bits, without set-user-ID, set-group-ID and sticky
NAMES_LIMIT = 100_000  # entries in one directory
_FOLDER = os.O_RDONLY | os.O_DIRECTORY

FileKind = Literal["file", "directory", "symlink", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStatus:
    """The result of ``lstat`` for one guest file.

    Attributes:
        kind: the kind of file.
        mode: the twelve permission bits.
        size: in bytes.
        uid: the owner.
        gid: the group.
        links: the number of hard links; meaningless for directories.
    """

    kind: FileKind
    mode: int
    uid: int
    gid: int
    size: int
    links: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """The attributes of a new file.

    Attributes:
        mode: the twelve permission bits, or None for the default: 0644 for a file, 0755
            for a directory. A link has none.
        uid: the owner.
        gid: the group.
        label: the SELinux label, or None to leave it to the filesystem.
    """

    mode: int | None = None
    uid: int = 0
    gid: int = 0
    label: str | None = None


PLAIN = Attributes()


def kind_of(mode: int) -> FileKind:
    """Return the kind of file of an ``st_mode`` (inode(7))."""
    kinds: dict[int, FileKind] = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "symlink",
    }
    return kinds.get(stat.S_IFMT(mode), "other")


class LinkCircleError(InspectionError):
    """A guest path leads through a circle of links, so there is no file."""


class LinkReader(Protocol):
    """The methods that are needed to follow links."""

    def lstat(self, path: PurePosixPath) -> FileStatus | None:
        """Return the status of the file at path, its last link not followed, or None."""

    def readlink(self, path: PurePosixPath) -> str:
        """Return the target of the link at path, as stored in it."""


class GuestReader(LinkReader, Protocol):
    """Read-only access to one guest's files.

    Every method raises ``InspectionError`` (naming the guest path) if the filesystem itself
    fails.  A missing file is a value, not an error.
    """

    def read(self, path: PurePosixPath, *, limit: int, offset: int = 0) -> bytes:
        """Return at most ``limit`` bytes of the regular file at path, from ``offset``."""

    def load(self, path: PurePosixPath, *, limit: int) -> tuple[FileStatus, bytes]:
        """Return status and at most ``limit`` bytes of a regular file, a last link not followed.

        Both describe the same file, even if the tree changes meanwhile.
        """

    def list_directory(self, path: PurePosixPath) -> list[str]:
        """Return the sorted names in the directory at path, except those that are not UTF-8."""

    def label(self, path: PurePosixPath) -> str | None:
        """Return the SELinux label (``security.selinux``) of the file at path, or None."""

    def takes_labels(self) -> bool:
        """Return whether labels can be written to the guest's root filesystem."""


class GuestFilesystem(GuestReader, Protocol):
    """Read and write access to one guest's files.

    Every writing method raises ``ApplyError`` (naming the guest path), or its subclass
    ``GuestSpaceError`` if the guest's filesystem is full or read-only.
    """

    def write(self, path: PurePosixPath, content: bytes, attributes: Attributes = PLAIN) -> None:
        """Put a new regular file at path; it replaces a file or link.

        It is always a new file, so other hard links of the old one keep the old
        content.
        """

    def make_directory(self, path: PurePosixPath, attributes: Attributes = PLAIN) -> None:
        """Create a directory; its parent exists."""

    def symlink(self, path: PurePosixPath, target: str, attributes: Attributes = PLAIN) -> None:
        """Put a new link at path; it replaces a file or link."""

    def remove(self, path: PurePosixPath) -> None:
        """Remove the file, link or empty directory at path; other hard links stay."""

    def set_label(self, path: PurePosixPath, label: str) -> None:
        """Set the SELinux label of the file at path."""


def resolve(reader: LinkReader, path: PurePosixPath, *, last: bool = True) -> PurePosixPath:
    """Return the path with every symbolic link resolved inside the guest's root.

    Components that do not exist are kept, so the path of a file that is yet to be made
    resolves too.  Nothing is looked up below a file that is not a directory.

    Args:
        reader: the guest.
        path: an absolute guest path.
        last: also follow a link in the last component.

    Raises:
        LinkCircleError: the links lead in a circle.
    """
    todo = list(reversed(path.parts[1:]))
    done = ROOT
    missing: PurePosixPath | None = None
    links = 0
    while todo:
        name = todo.pop()
        if name == "..":
            if done == missing:
                missing = None
            done = done.parent
            continue
        here = done / name
        status = reader.lstat(here) if missing is None and (todo or last) else None
        if status is None or status.kind != "symlink":
            if missing is None and (status is None or status.kind != "directory"):
                missing = here
            done = here
            continue
        links += 1
        if links > LINK_LIMIT:
            raise circle(path)
        target = PurePosixPath(reader.readlink(here))
        if target.is_absolute():
            done = ROOT
        todo.extend(reversed([part for part in target.parts if part != "/"]))
    return done


def circle(path: PurePosixPath) -> LinkCircleError:
    """Return the error for a path that leads through a circle of links."""
    return LinkCircleError(
        f"guest path {path} leads through a circle of links", hint="repair the links in the guest"
    )


def follow(reader: LinkReader, path: PurePosixPath) -> PurePosixPath | None:
    """Return the path without any symbolic link in it, or None if the links lead in a circle.

    Readers use this function, because a program that opens such a path finds no file.
    """
    try:
        return resolve(reader, path)
    except LinkCircleError:
        return None


def status_of(reader: GuestReader, path: PurePosixPath) -> FileStatus | None:
    """Return the status of the file that the path leads to, links followed, or None."""
    real = follow(reader, path)
    return reader.lstat(real) if real else None


def read_text(reader: GuestReader, path: PurePosixPath, limit: int = TEXT_LIMIT) -> str | None:
    """Return the first ``limit`` bytes as text, invalid bytes replaced; None without a file."""
    real = resolved_file(reader, path)
    if real is None:
        return None
    return reader.read(real, limit=limit).decode("utf-8", errors="replace")


def resolved_file(reader: GuestReader, path: str | PurePosixPath) -> PurePosixPath | None:
    """Return the real path of the regular file at path, or None if there is none."""
    real = follow(reader, PurePosixPath(path))
    status = reader.lstat(real) if real else None
    return real if status is not None and status.kind == "file" else None


def read_all(reader: GuestReader, path: PurePosixPath, limit: int) -> bytes:
    """Return the whole content of a regular file.

    Raises:
        InspectionError: the file is larger than ``limit`` bytes.
    """
    content = reader.read(path, limit=limit + 1)
    check_size(path, len(content), limit)
    return content


def check_size(path: PurePosixPath, size: int, limit: int) -> None:
    """Check the size of a guest file, or of its content read with a limit one byte higher.

    Raises:
        InspectionError: the file is larger than ``limit`` bytes.
    """
    if size > limit:
        raise InspectionError(
            f"guest file {path} is larger than the {limit} bytes allowed for it",
            hint="move it out of the way in the guest",
        )


def valid_names(names: Iterable[bytes]) -> list[str]:
    """Return the names that are valid UTF-8, sorted; vmprovision's files have no other names."""
    decoded = []
    for name in names:
        with contextlib.suppress(UnicodeDecodeError):
            decoded.append(name.decode("utf-8"))
    return sorted(decoded)


def apply_failure(path: PurePosixPath, number: int, cause: str) -> ApplyError:
    """Return the error for a write to a guest path that failed with this errno."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return GuestSpaceError(
            f"the guest's filesystem is full: cannot write guest path {path}",
            hint="make room in the guest, or enlarge its disk and filesystem",
        )
    if number == errno.EROFS:
        return GuestSpaceError(
            f"the guest's filesystem is read-only: cannot write guest path {path}",
            hint="it may be a squashfs, an ISO image, a sealed root or a btrfs snapshot: "
            "`vmprovision seed` writes nothing to the image; of OpenWrt, take an ext4 image",
        )
    return ApplyError(f"cannot write guest path {path}: {cause}")
