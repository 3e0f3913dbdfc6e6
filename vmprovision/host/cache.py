"""The directories in which vmprovision keeps what it can make again, and what it cannot."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
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


def cache_directory() -> Path:
    """``$VMPROVISION_CACHE``, else ``vmprovision`` in the XDG cache directory; not created."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "vmprovision"


def state_directory() -> Path:
    """Return ``$VMPROVISION_STATE``, else that of ``XDG_STATE_HOME``; not created."""
    if named := os.environ.get(STATE_VARIABLE):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local/state") / "vmprovision"


def make_private(directory: Path) -> None:
    """Make a directory and those above it that are missing, each for its owner only.

    ``mkdir`` gives those above what the umask leaves, and one that a group can write to
    is not trusted later.

    Raises:
        OSError: one cannot be made.
    """
    for path in reversed((directory, *directory.parents)):
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Put content at path as a whole or not at all; its directory is made, for its owner only.

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
    """Return an open file of this user's own, whoever else can write to its directory.

    Where others can, they may have put a pipe there, which would hold us up, or a link.

    Raises:
        OSError: it cannot be opened, or is no regular file of this user's.
    """
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        return handle
    os.close(handle)
    raise PermissionError(errno.EPERM, "is no file of this user's", str(path))


@contextlib.contextmanager
def locked(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file, whose directory is made, for its owner only.

    Args:
        path: of the lock file.
        wait: called again and again while another holds it, who may take minutes;
            what it raises ends the waiting.

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
