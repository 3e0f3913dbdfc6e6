"""The directories for content that can be made again (cache) and content that cannot (state)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CACHE_VARIABLE = "VMPROVISION_CACHE"
STATE_VARIABLE = "VMPROVISION_STATE"
LOCK_POLL_SECONDS = 0.2
KEPT_SECONDS = 7 * 86400.0  # content for another key, most likely from another version


def cache_directory() -> Path:
    """Return ``$VMPROVISION_CACHE``, else ``vmprovision`` of ``XDG_CACHE_HOME``; not created."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "vmprovision"


def state_directory() -> Path:
    """Return ``$VMPROVISION_STATE``, else ``vmprovision`` of ``XDG_STATE_HOME``; not created."""
    if named := os.environ.get(STATE_VARIABLE):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local/state") / "vmprovision"


def make_private(directory: Path) -> None:
    """Make a directory and its missing parents, each for its owner only.

    ``mkdir(parents=True)`` applies only the umask to the parents, and a directory that a
    group can write to is not trusted later.

    Raises:
        OSError: one cannot be made.
    """
    for path in reversed((directory, *directory.parents)):
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)


def require_private(*directories: Path) -> None:
    """Check that no other user can write to these directories.

    Raises:
        PermissionError: another user can, or one of them is not a directory.
        OSError: one of them cannot be examined.
    """
    for path in directories:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it is not a directory of this user", str(path))
        if status.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "it can be written by others", str(path))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all; make its directory for its owner only.

    Raises:
        OSError: the directory or the file cannot be written.
    """
    make_private(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def open_own(path: Path, flags: int) -> int:
    """Open a file that must be this user's own, even if others can write to its directory.

    They may have put a pipe there, which would block this process, or a link.

    Raises:
        OSError: it cannot be opened, or is not a regular file of this user.
    """
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        return handle
    os.close(handle)
    raise PermissionError(errno.EPERM, "it is not a file of this user", str(path))


@contextlib.contextmanager
def locked(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file; make its directory for its owner only.

    Args:
        path: the lock file.
        wait: called repeatedly while another process holds the lock, which may take
            minutes; an exception from it ends the waiting.

    Raises:
        OSError: the file cannot be made.
    """
    make_private(path.parent)
    handle = open_own(path, os.O_RDWR | os.O_CREAT)
    with os.fdopen(handle, "rb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wait()
                time.sleep(LOCK_POLL_SECONDS)
        yield


@contextlib.contextmanager
def build_directory(target: Path, wait: Callable[[], None]) -> Iterator[Path]:
    """Give an empty directory beside a target of the cache, to build the target in.

    A lock makes other builders of the target wait, so look again whether it exists
    before building it.  The directory is removed at the end, and so are those of
    builders that were killed.  Its name holds the process id, because programs that a
    killed builder started may write to theirs for a while.

    Args:
        target: the file or directory to build.
        wait: called repeatedly while another process builds it; see ``locked``.

    Raises:
        OSError: the lock or the directory cannot be made.
    """
    with locked(target.with_suffix(".lock"), wait):
        for abandoned in target.parent.glob(f"{target.stem}-*.building"):
            shutil.rmtree(abandoned, ignore_errors=True)
        directory = target.with_name(f"{target.stem}-{os.getpid()}.building")
        directory.mkdir(mode=0o700)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def cached_content(name: str, key: str, make: Callable[[], bytes]) -> bytes:
    """Return content that the cache keeps; make it if the cache lacks it or cannot be trusted.

    Only a file that nobody else can write to is read, and only if its content has the
    digest that was written before it.  A cache that cannot be used costs time only.

    Args:
        name: the folder in the cache for this kind of content.
        key: a value that changes with every input of the content.
        make: returns the content.
    """
    path = cache_directory() / name / key
    with contextlib.suppress(OSError):
        require_private(cache_directory(), path.parent)
        with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
            digest, _, content = file.read().partition(b"\n")
        if digest == _digest(content):
            return content
    content = make()
    with contextlib.suppress(OSError):
        make_private(path.parent)
        require_private(cache_directory(), path.parent)
        for other in path.parent.iterdir():
            if other.lstat().st_mtime + KEPT_SECONDS < time.time():
                other.unlink()
        write_atomically(path, _digest(content) + b"\n" + content)
    return content


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode("ascii")
