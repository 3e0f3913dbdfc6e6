"""A directory of the host as a guest's root, read and written in place."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from vmprovision.errors import (
    ImageLockedError,
    InspectionError,
)
from vmprovision.filesystem import inroot
from vmprovision.filesystem.inroot import Root
from vmprovision.filesystem.protocol import (
    NAMES_LIMIT,
    PLAIN,
    SELINUX,
    Attributes,
    FileStatus,
    apply_failure,
    circle,
    kind_of,
    valid_names,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path, PurePosixPath

_FOLDER = os.O_RDONLY | os.O_DIRECTORY


class LocalFilesystem:
    """The tree below a host directory as a guest: an unpacked root filesystem, or test data.

    Nothing outside the root is read or written, even while the tree changes: every path
    is opened inside it (``inroot``), and writes go through descriptors. A new file is
    complete and durable under a temporary name before it gets its own. If the caller is
    not root, the caller's files count as owned by the guest's root (as with fakeroot),
    because the caller cannot make files of other users.
    """

    def __init__(self, root: Path) -> None:
        """Keep the host directory that is the guest's ``/``."""
        self.root = root
        self._tree = Root(root)

    def lstat(self, path: PurePosixPath) -> FileStatus | None:
        """Implement ``GuestReader.lstat``."""
        try:
            with self._tree.opened(path, os.O_PATH | os.O_NOFOLLOW) as handle:
                return _status(os.fstat(handle))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            if exc.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # no file can have such a path
                return None
            raise _unreadable("path", path, exc) from exc
        except ValueError as exc:
            raise InspectionError(f"cannot read guest path {path}: {exc}") from exc

    def read(self, path: PurePosixPath, *, limit: int, offset: int = 0) -> bytes:
        """Implement ``GuestReader.read``."""
        return self._load(path, limit, offset=offset)[1]

    def load(self, path: PurePosixPath, *, limit: int) -> tuple[FileStatus, bytes]:
        """Implement ``GuestReader.load``."""
        return self._load(path, limit, flags=os.O_NOFOLLOW)

    def _load(
        self, path: PurePosixPath, limit: int, *, offset: int = 0, flags: int = 0
    ) -> tuple[FileStatus, bytes]:
        try:
            # checked first, because opening a device may have side effects
            with self._tree.opened(path, os.O_PATH | flags) as handle:
                _check_regular(path, handle)
            handle = self._tree.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | flags)
            with os.fdopen(handle, "rb") as file:
                _check_regular(path, handle)
                file.seek(offset)
                return _status(os.fstat(handle)), file.read(limit)
        except OSError as exc:
            raise _unreadable("file", path, exc) from exc

    def readlink(self, path: PurePosixPath) -> str:
        """Implement ``GuestReader.readlink``."""
        try:
            with self._tree.opened(path, os.O_PATH | os.O_NOFOLLOW) as handle:
                return os.readlink("", dir_fd=handle)
        except OSError as exc:
            raise _unreadable("link", path, exc) from exc

    def list_directory(self, path: PurePosixPath) -> list[str]:
        """Implement ``GuestReader.list_directory``."""
        names = []
        try:
            with self._tree.opened(path, _FOLDER) as handle, os.scandir(handle) as entries:
                for entry in entries:
                    names.append(os.fsencode(entry.name))
                    if len(names) > NAMES_LIMIT:
                        raise InspectionError(
                            f"guest directory {path} has more than {NAMES_LIMIT} entries",
                            hint="clear it in the guest",
                        )
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as exc:
            if exc.errno == errno.ELOOP:
                return []
            raise _unreadable("directory", path, exc) from exc
        return valid_names(names)

    def label(self, path: PurePosixPath) -> str | None:
        """Implement ``GuestReader.label``."""
        try:
            with self._tree.opened(path, os.O_PATH | os.O_NOFOLLOW) as handle:
                raw = os.getxattr(inroot.by_name(handle), SELINUX)
        except OSError:
            return None
        return raw.rstrip(b"\0").decode("utf-8", errors="replace")

    def takes_labels(self) -> bool:
        """Implement ``GuestReader.takes_labels``: root in a container may lack CAP_SYS_ADMIN."""
        try:
            os.getxattr(self._tree.handle, SELINUX)
        except OSError as exc:
            if exc.errno != errno.ENODATA:
                return False
        # tried on a file in memory, so that the guest is not touched
        probe = os.memfd_create("label")
        try:
            os.setxattr(probe, SELINUX, b"system_u:object_r:tmpfs_t:s0")
        except OSError:
            return False
        finally:
            os.close(probe)
        return True

    def write(self, path: PurePosixPath, content: bytes, attributes: Attributes = PLAIN) -> None:
        """Implement ``GuestFilesystem.write``."""

        def make(folder: int, name: str) -> None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            handle = os.open(name, flags, 0o600, dir_fd=folder)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                _dress(handle, attributes, 0o644)
                os.fsync(handle)

        with _applying(path):
            self._tree.put(path, make)

    def make_directory(self, path: PurePosixPath, attributes: Attributes = PLAIN) -> None:
        """Implement ``GuestFilesystem.make_directory``."""

        def make(folder: int, name: str) -> None:
            os.mkdir(name, 0o700, dir_fd=folder)
            handle = os.open(name, _FOLDER | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                _dress(handle, attributes, 0o755)
                inroot.sync(handle)
            finally:
                os.close(handle)

        if self.lstat(path) is not None:
            raise apply_failure(path, errno.EEXIST, os.strerror(errno.EEXIST))
        with _applying(path):
            self._tree.put(path, make)

    def symlink(self, path: PurePosixPath, target: str, attributes: Attributes = PLAIN) -> None:
        """Implement ``GuestFilesystem.symlink``."""

        def make(folder: int, name: str) -> None:
            os.symlink(target, name, dir_fd=folder)
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            handle = os.open(name, flags, dir_fd=folder)
            try:
                _dress(handle, attributes, None)
            finally:
                os.close(handle)

        with _applying(path):
            self._tree.put(path, make)

    def remove(self, path: PurePosixPath) -> None:
        """Implement ``GuestFilesystem.remove``."""
        with _applying(path):
            self._tree.remove(path)

    def set_label(self, path: PurePosixPath, label: str) -> None:
        """Implement ``GuestFilesystem.set_label``."""
        flags = os.O_PATH | os.O_NOFOLLOW
        with _applying(path), self._tree.opened(path, flags) as handle:
            _set_label(handle, label)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other runs.

        Raises:
            ImageLockedError: another run holds the lock.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._tree.locked())
            except BlockingIOError as exc:
                raise ImageLockedError(
                    "another vmprovision is working in this directory",
                    hint="wait until it is done",
                ) from exc
            yield

    def clear(self, folders: Iterable[PurePosixPath]) -> None:
        """Remove temporary files that a killed run left in these directories."""
        for path in folders:
            for name in self.list_directory(path):
                if inroot.is_temporary(name):
                    self.remove(path / name)


def _status(status: os.stat_result) -> FileStatus:
    own = os.geteuid() != 0
    return FileStatus(
        kind=kind_of(status.st_mode),
        mode=stat.S_IMODE(status.st_mode),
        uid=0 if own and status.st_uid == os.geteuid() else status.st_uid,
        gid=0 if own and status.st_gid == os.getegid() else status.st_gid,
        size=status.st_size,
        links=status.st_nlink,
    )


def _check_regular(path: PurePosixPath, handle: int) -> None:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise InspectionError(f"guest path {path} is not a regular file")


def _dress(handle: int, attributes: Attributes, mode: int | None) -> None:
    """Set owner, mode (except for a link) and label of a new file.

    The owner is first, because changing it clears the set-user-ID and set-group-ID
    bits.
    """
    inroot.check_own(handle)
    made, wanted = _status(os.fstat(handle)), (attributes.uid, attributes.gid)
    if (made.uid, made.gid) != wanted:
        inroot.change_owner(handle, *wanted)
    if mode is not None:
        os.fchmod(handle, mode if attributes.mode is None else attributes.mode)
    if attributes.label is not None:
        _set_label(handle, attributes.label)


def _set_label(handle: int, label: str) -> None:
    os.setxattr(inroot.by_name(handle), SELINUX, label.encode() + b"\0")


def _unreadable(what: str, path: PurePosixPath, exc: OSError) -> InspectionError:
    if exc.errno == errno.ELOOP:
        return circle(path)
    return InspectionError(f"cannot read guest {what} {path}: {exc.strerror}")


class _applying(contextlib.AbstractContextManager[None]):  # noqa: N801 -- reads as a verb
    """Turn an ``OSError`` on a guest path into an error that names the path."""

    def __init__(self, path: PurePosixPath) -> None:
        self.path = path

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            number = error.errno or 0
            raise apply_failure(self.path, number, error.strerror or str(error)) from error
