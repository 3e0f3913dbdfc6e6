"""Open and make files below a host directory, like a process that has it as its root.

The tree may change at any time, so a path is never checked first and opened afterwards.
openat2(2) resolves it with ``RESOLVE_IN_ROOT``, so that no link or ``..`` leads out. If
the kernel is older than 5.6, or a container's seccomp filter blocks the call, the path
is walked by descriptors instead: one component after the other, each opened without
following a link.

A new file gets its name only when it is complete and durable. So a reader finds either
the old file or the new one, even after a crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import stat
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path, PurePosixPath

LINK_LIMIT = 40  # the kernel's own limit (path_resolution(7))
DEPTH_LIMIT = 200  # directories that a walk holds open
TRIES = 100  # retries for a path with `..` while directories are renamed
# An unfinished file's name: this prefix and so many random bytes, in hexadecimal.
_TEMPORARY = ".vmprovision-"
_TOKEN_BYTES = 8
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_OPENAT2 = 437  # the number is the same on all other architectures
_OTHER_NUMBERS = ("alpha", "ia64", "mips")
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10
_AT_EMPTY_PATH = 0x1000  # linux/fcntl.h; the os module lacks it
_LIBC = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    """``struct open_how`` of linux/openat2.h."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


class Root:
    """A host directory that is held open, and inside which paths are opened."""

    def __init__(self, path: Path) -> None:
        """Open the directory.

        Raises:
            OSError: it is not a directory, or cannot be read.
        """
        self.handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.handle)
        self._by_kernel = _has_openat2(self.handle)

    def open(self, path: PurePosixPath, flags: int) -> int:
        """Open an existing file; links are followed inside the root, including the last one.

        Args:
            path: relative to the root.
            flags: as for open(2); ``O_NOFOLLOW`` applies to the last component.

        Raises:
            OSError: as open(2); ``ELOOP`` also for a circle of links.
            ValueError: the path cannot be a file's name.
        """
        raw = os.fsencode(path)
        if b"\0" in raw:
            raise ValueError("a NUL in a path")
        flags |= os.O_CLOEXEC
        if self._by_kernel:
            for _ in range(TRIES):
                with contextlib.suppress(BlockingIOError):  # EAGAIN: a rename raced with a `..`
                    return _openat2(self.handle, raw, flags)
        return _walk(self.handle, list(path.parts), flags)

    @contextlib.contextmanager
    def opened(self, path: PurePosixPath, flags: int) -> Iterator[int]:
        """Open an existing file for the duration of the block.

        Raises:
            OSError: as ``open``.
        """
        handle = self.open(path, flags)
        try:
            yield handle
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory's flock(2).

        Raises:
            BlockingIOError: another process holds it.
        """
        fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            fcntl.flock(self.handle, fcntl.LOCK_UN)

    def put(self, path: PurePosixPath, make: Callable[[int, str], None]) -> None:
        """Make a file under a temporary name beside path, then rename it to path.

        Args:
            path: where a file, a link or nothing is.
            make: makes the file, given the descriptor of a directory and the name in
                it.

        Raises:
            OSError: a system call failed; the temporary file is removed.
        """
        temporary = _TEMPORARY + secrets.token_hex(_TOKEN_BYTES)
        with self.opened(path.parent, _FOLDER) as folder:
            try:
                make(folder, temporary)
                os.rename(temporary, _name(path), src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    _unlink(folder, temporary)
                raise
            sync(folder)

    def remove(self, path: PurePosixPath) -> None:
        """Remove a file, a link or an empty directory, durably.

        Raises:
            OSError: as unlink(2) and rmdir(2).
        """
        with self.opened(path.parent, _FOLDER) as folder:
            _unlink(folder, _name(path))
            sync(folder)


def is_temporary(name: str) -> bool:
    """Return whether this is the temporary name of a file that ``put`` did not finish."""
    token = name.removeprefix(_TEMPORARY)
    return token != name and len(token) == 2 * _TOKEN_BYTES


def by_name(handle: int) -> str:
    """Return a name by which path-based calls reach a descriptor's file, even a link."""
    return f"/proc/self/fd/{handle}"


def check_own(handle: int) -> None:
    """Check that the file just made was not replaced by another user's.

    Raises:
        OSError: it was replaced.
    """
    if os.fstat(handle).st_uid != os.geteuid():
        raise OSError(errno.ESTALE, "another file was put in its place")


def sync(handle: int) -> None:
    """Make a directory durable, if the filesystem supports that.

    Raises:
        OSError: as fsync(2).
    """
    try:
        os.fsync(handle)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def change_owner(handle: int, uid: int, gid: int) -> None:
    """Change the owner of a descriptor's file, even of a link opened with ``O_PATH``.

    Raises:
        OSError: as chown(2).
    """
    if _LIBC.fchownat(handle, b"", uid, gid, _AT_EMPTY_PATH):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _name(path: PurePosixPath) -> str:
    if path.name in ("", ".."):
        raise OSError(errno.EINVAL, "it is not the name of a file")
    return path.name


def _unlink(folder: int, name: str) -> None:
    if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        os.rmdir(name, dir_fd=folder)
    else:
        os.unlink(name, dir_fd=folder)


def _openat2(root: int, path: bytes, flags: int) -> int:
    how = _OpenHow(flags=flags, mode=0, resolve=_RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    handle: int = _LIBC.syscall(
        ctypes.c_long(_OPENAT2),
        ctypes.c_int(root),
        ctypes.c_char_p(path),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if handle < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return handle


def _has_openat2(root: int) -> bool:
    if os.uname().machine.startswith(_OTHER_NUMBERS):
        return False
    try:
        os.close(_openat2(root, b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:  # ENOSYS, or EPERM from a seccomp filter that does not know the call
        return False
    return True


def _walk(root: int, parts: list[str], flags: int) -> int:
    """Open a path component by component; ``..`` returns to the directory opened before."""
    todo = parts[::-1]
    held = [root]
    links = 0
    try:
        while todo:
            name = todo.pop()
            if name == "/":
                _close(held, 1)
            elif name == "..":
                _close(held, max(1, len(held) - 1))
            else:
                last = not todo
                handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=held[-1])
                held.append(handle)
                is_link = stat.S_ISLNK(os.fstat(handle).st_mode)
                if is_link and not (last and flags & os.O_NOFOLLOW):
                    links += 1
                    if links > LINK_LIMIT:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    target = os.readlink("", dir_fd=handle)
                    _close(held, len(held) - 1)
                    todo.extend(_parts(target))
                elif last:
                    _close(held, len(held) - 1)
                    return os.open(name, flags | os.O_NOFOLLOW, dir_fd=held[-1])
                elif len(held) > DEPTH_LIMIT:
                    raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        return os.open(".", flags, dir_fd=held[-1])
    finally:
        _close(held, 1)


def _parts(target: str) -> list[str]:
    """Return the components of a link's target in reverse order; ``/`` marks an absolute one."""
    found = [part for part in target.split("/") if part not in ("", ".")]
    return [*reversed(found), *("/" for _ in range(target.startswith("/")))]


def _close(held: list[int], keep: int) -> None:
    """Close the descriptors that were opened last, down to ``keep``."""
    while len(held) > keep:
        os.close(held.pop())
