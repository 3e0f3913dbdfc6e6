"""A guest's filesystem as the rest of the program sees it, offline.

Two Protocols: inspection receives a ``GuestReader`` and so cannot write, as the
types prove; only ``apply.py`` receives a ``GuestFilesystem``.  Guest paths are
absolute ``PurePosixPath``; a symbolic link, relative or absolute, is followed
inside the guest's root and never out of it.  The *last* component of a path is
followed by ``read`` only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

from vmprovision.errors import ApplyError, GuestSpaceError, InspectionError

ROOT = PurePosixPath("/")
LINK_LIMIT = 40  # as the kernel's own (path_resolution(7))
TEXT_LIMIT = 1 << 20
SELINUX = "security.selinux"  # the extended attribute that holds the label (xattr(7))

FileKind = Literal["file", "directory", "symlink", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStatus:
    """What ``lstat`` says of one guest file: size in bytes, mode as its twelve permission bits."""

    kind: FileKind
    mode: int
    uid: int
    gid: int
    size: int


def kind_of(mode: int) -> FileKind:
    """What kind of file an ``st_mode`` (inode(7)) is of."""
    kinds: dict[int, FileKind] = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "symlink",
    }
    return kinds.get(stat.S_IFMT(mode), "other")


class GuestReader(Protocol):
    """Read-only access to one guest's files.

    Every method raises ``InspectionError`` (naming the guest path) where the
    filesystem itself fails; absence is a value, not an error.
    """

    def lstat(self, path: PurePosixPath) -> FileStatus | None:
        """Status of what stands at path, a last link not followed; None where nothing does."""

    def read(self, path: PurePosixPath, *, limit: int, offset: int = 0) -> bytes:
        """At most ``limit`` bytes of the regular file at path, from ``offset``."""

    def readlink(self, path: PurePosixPath) -> str:
        """The target of the link at path, as it is written in it."""

    def list_directory(self, path: PurePosixPath) -> list[str]:
        """Sorted names in the directory at path; those that are no valid UTF-8 are left out."""

    def label(self, path: PurePosixPath) -> str | None:
        """The SELinux label (``security.selinux``) of what stands at path, if it has one."""

    def takes_labels(self) -> bool:
        """Whether labels can be written to the guest's root filesystem from here."""


class GuestFilesystem(GuestReader, Protocol):
    """Read and write access to one guest's files.

    Every writing method raises ``ApplyError`` (naming the guest path), or its
    subclass ``GuestSpaceError`` where the guest's filesystem is full or read-only.
    """

    def write(self, path: PurePosixPath, content: bytes) -> None:
        """Make the regular file at path hold content: created, or truncated and rewritten."""

    def make_directory(self, path: PurePosixPath) -> None:
        """Create the directory; its parent exists."""

    def symlink(self, path: PurePosixPath, target: str) -> None:
        """Create a link at path, where nothing stands."""

    def remove(self, path: PurePosixPath) -> None:
        """Remove the file, link or empty directory at path."""

    def set_mode(self, path: PurePosixPath, mode: int) -> None:
        """Give the file or directory its twelve permission bits."""

    def set_owner(self, path: PurePosixPath, uid: int, gid: int) -> None:
        """Give the file, directory or link its owner."""

    def set_label(self, path: PurePosixPath, label: str) -> None:
        """Give what stands at path its SELinux label."""


def resolve(reader: GuestReader, path: PurePosixPath, *, last: bool = True) -> PurePosixPath:
    """The path without any symbolic link in it, inside the guest's root.

    What does not exist is kept as it is written, so a path that is yet to be
    made resolves too.

    Args:
        reader: the guest.
        path: an absolute guest path.
        last: also follow a link in the last component.

    Raises:
        InspectionError: the links lead in a circle.
    """
    todo = list(reversed(path.parts[1:]))
    done = ROOT
    links = 0
    while todo:
        name = todo.pop()
        if name == "..":
            done = done.parent
            continue
        here = done / name
        status = reader.lstat(here) if todo or last else None
        if status is None or status.kind != "symlink":
            done = here
            continue
        links += 1
        if links > LINK_LIMIT:
            raise InspectionError(
                f"guest path {path} leads through a circle of links",
                hint="mend the links in the guest",
            )
        target = PurePosixPath(reader.readlink(here))
        if target.is_absolute():
            done = ROOT
        todo.extend(reversed([part for part in target.parts if part != "/"]))
    return done


def status_of(reader: GuestReader, path: PurePosixPath) -> FileStatus | None:
    """Status of what path leads to, links followed; None where nothing is there."""
    return reader.lstat(resolve(reader, path))


def read_text(reader: GuestReader, path: PurePosixPath, limit: int = TEXT_LIMIT) -> str | None:
    """The first ``limit`` bytes of a text file, undecodable bytes replaced; None where none is."""
    real = resolve(reader, path)
    status = reader.lstat(real)
    if status is None or status.kind != "file":
        return None
    return reader.read(real, limit=limit).decode("utf-8", errors="replace")


def resolved_file(reader: GuestReader, path: str) -> PurePosixPath | None:
    """Where the regular file at path really is, links followed; None where there is none."""
    real = resolve(reader, PurePosixPath(path))
    status = reader.lstat(real)
    return real if status is not None and status.kind == "file" else None


def read_all(reader: GuestReader, path: PurePosixPath, limit: int) -> bytes:
    """All of a regular file.

    Raises:
        InspectionError: it is larger than ``limit`` bytes.
    """
    content = reader.read(path, limit=limit + 1)
    if len(content) > limit:
        raise InspectionError(
            f"guest file {path} is larger than the {limit} bytes allowed for it",
            hint="move it out of the way in the guest",
        )
    return content


class LocalFilesystem:
    """The tree under a host directory as a guest: an unpacked root filesystem, or test data.

    Links are resolved here, inside the root, and every host call is made on a
    path without links; nothing outside the root is read or written.  Where the
    caller is not root, files of its own count as the guest's root's (as
    fakeroot has it), since nobody else's can be made.
    """

    def __init__(self, root: Path) -> None:
        """Take the host directory that is the guest's ``/``."""
        self.root = root

    def _at(self, path: PurePosixPath) -> Path:
        """The host path of a guest path whose parent is free of links."""
        parent = resolve(self, path.parent) if path != ROOT else ROOT
        return self.root.joinpath(*parent.parts[1:], *path.parts[1:][-1:])

    def lstat(self, path: PurePosixPath) -> FileStatus | None:
        """As the Protocol has it."""
        try:
            status = self._at(path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as exc:
            raise InspectionError(f"cannot read guest path {path}: {exc}") from exc
        own = os.geteuid() != 0
        return FileStatus(
            kind=kind_of(status.st_mode),
            mode=stat.S_IMODE(status.st_mode),
            uid=0 if own and status.st_uid == os.geteuid() else status.st_uid,
            gid=0 if own and status.st_gid == os.getegid() else status.st_gid,
            size=status.st_size,
        )

    def read(self, path: PurePosixPath, *, limit: int, offset: int = 0) -> bytes:
        """As the Protocol has it."""
        real = self._at(resolve(self, path))
        try:
            handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(handle, "rb") as file:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise InspectionError(f"guest path {path} is not a regular file")
                file.seek(offset)
                return file.read(limit)
        except OSError as exc:
            raise InspectionError(f"cannot read guest file {path}: {exc.strerror}") from exc

    def readlink(self, path: PurePosixPath) -> str:
        """As the Protocol has it."""
        try:
            return str(self._at(path).readlink())
        except OSError as exc:
            raise InspectionError(f"cannot read guest link {path}: {exc.strerror}") from exc

    def list_directory(self, path: PurePosixPath) -> list[str]:
        """As the Protocol has it."""
        try:
            # as bytes: a guest's names need not be valid UTF-8
            names = os.listdir(os.fsencode(self._at(resolve(self, path))))  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as exc:
            raise InspectionError(f"cannot list guest directory {path}: {exc.strerror}") from exc
        return valid_names(names)

    def label(self, path: PurePosixPath) -> str | None:
        """As the Protocol has it."""
        try:
            raw = os.getxattr(self._at(path), SELINUX, follow_symlinks=False)
        except OSError:
            return None
        return raw.rstrip(b"\0").decode("utf-8", errors="replace")

    def takes_labels(self) -> bool:
        """As the Protocol has it: needs CAP_SYS_ADMIN, which root in a container may lack."""
        try:
            os.getxattr(self.root, SELINUX)
        except OSError as exc:
            if exc.errno != errno.ENODATA:
                return False
        # root's own rights, seen on a file that is nobody's: the guest is not touched
        probe = os.memfd_create("label")
        try:
            os.setxattr(probe, SELINUX, b"system_u:object_r:tmpfs_t:s0")
        except OSError:
            return False
        finally:
            os.close(probe)
        return True

    def write(self, path: PurePosixPath, content: bytes) -> None:
        """As the Protocol has it."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
        with _applying(path), os.fdopen(os.open(self._at(path), flags, 0o600), "wb") as file:
            file.write(content)

    def make_directory(self, path: PurePosixPath) -> None:
        """As the Protocol has it."""
        with _applying(path):
            self._at(path).mkdir()

    def symlink(self, path: PurePosixPath, target: str) -> None:
        """As the Protocol has it."""
        with _applying(path):
            self._at(path).symlink_to(target)

    def remove(self, path: PurePosixPath) -> None:
        """As the Protocol has it."""
        here = self._at(path)
        with _applying(path):
            if stat.S_ISDIR(here.lstat().st_mode):
                here.rmdir()
            else:
                here.unlink()

    def set_mode(self, path: PurePosixPath, mode: int) -> None:
        """As the Protocol has it."""
        here = self._at(path)
        with _applying(path):
            if stat.S_ISLNK(here.lstat().st_mode):
                raise ApplyError(f"guest path {path} is a link and takes no mode")
            here.chmod(mode)

    def set_owner(self, path: PurePosixPath, uid: int, gid: int) -> None:
        """As the Protocol has it."""
        if os.geteuid() != 0 and uid == gid == 0:
            return
        with _applying(path):
            os.chown(self._at(path), uid, gid, follow_symlinks=False)

    def set_label(self, path: PurePosixPath, label: str) -> None:
        """As the Protocol has it."""
        with _applying(path):
            os.setxattr(self._at(path), SELINUX, label.encode() + b"\0", follow_symlinks=False)


def valid_names(names: list[bytes]) -> list[str]:
    """The names that are valid UTF-8, sorted; no file of ours could be named otherwise."""
    decoded = []
    for name in names:
        with contextlib.suppress(UnicodeDecodeError):
            decoded.append(name.decode("utf-8"))
    return sorted(decoded)


def apply_failure(path: PurePosixPath, number: int, cause: str) -> ApplyError:
    """The error for a write to a guest path that failed with this errno."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return GuestSpaceError(
            f"the guest's filesystem is full: cannot write guest path {path}",
            hint="make room in the guest, or enlarge its disk and filesystem",
        )
    if number == errno.EROFS:
        return GuestSpaceError(
            f"the guest's filesystem is read-only: cannot write guest path {path}",
            hint="a squashfs, ISO or verity root cannot be injected into",
        )
    return ApplyError(f"cannot write guest path {path}: {cause}")


class _applying(contextlib.AbstractContextManager[None]):  # noqa: N801 -- reads as a verb
    """Turn an ``OSError`` on a guest path into the error that names it."""

    def __init__(self, path: PurePosixPath) -> None:
        self.path = path

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            number = error.errno or 0
            raise apply_failure(self.path, number, error.strerror or str(error)) from error
