"""Private folders for work in progress: gone with the process that made them.

Each is in the cache, else in the temporary directory, under a name that nobody can
predict, for its owner alone.  The process holds a lock on the folder itself as long
as it lives, so the next one knows what a killed process left, and removes it.

What another program made elsewhere for the same work is removed as well, where the
folder's file ``elsewhere`` names it: libguestfs makes root's sockets in ``/tmp``,
whatever it is told.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.host.cache import cache_directory, make_private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PREFIX = "vmprovision-"
SHORTEST = Path("/tmp")  # noqa: S108 -- where the others' paths are too long; the name is by chance
ELSEWHERE = "elsewhere"
OTHERS = "libguestfs"  # how the names of folders elsewhere begin
ELSEWHERE_LIMIT = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """A private folder that exists.

    Attributes:
        path: where it is.
        lock: the open folder, which is locked.
    """

    path: Path
    lock: int

    def remove(self) -> None:
        """Remove the folder with all in it, and what it says is elsewhere."""
        _remove(self.path)
        os.close(self.lock)


def make_workspace(purpose: str, suits: Callable[[Path], bool] = lambda _: True) -> Workspace:
    """Return a new private folder, after those that killed processes left are removed.

    Args:
        purpose: a word of its name.
        suits: whether a folder's path can be used; else one in another place is tried.

    Raises:
        OSError: none can be made.
    """
    failures: list[OSError] = []
    for find_place in (_place_in_cache, lambda: Path(tempfile.gettempdir()), lambda: SHORTEST):
        try:
            made = make_workspace_in(find_place(), f"{PREFIX}{purpose}-")
        except OSError as exc:
            failures.append(exc)
            continue
        if suits(made.path):
            return made
        made.remove()
        failures.append(OSError(f"{made.path} has characters or a length that QEMU cannot take"))
    raise failures[-1]


@contextlib.contextmanager
def workspace(purpose: str) -> Iterator[Path]:
    """Give a new private folder, which is removed at the end.

    Raises:
        OSError: none can be made.
    """
    made = make_workspace(purpose)
    try:
        yield made.path
    finally:
        made.remove()


def make_workspace_in(place: Path, prefix: str) -> Workspace:
    """Return a new private folder in a directory, cleared of abandoned ones with that prefix.

    Raises:
        OSError: none can be made there, or the filesystem has no locks on directories.
    """
    with contextlib.suppress(OSError):
        for path in place.iterdir():
            if path.name.startswith(prefix):
                _remove_abandoned(path)
    while True:
        path = Path(tempfile.mkdtemp(dir=place, prefix=prefix))
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:  # another process may have taken it for an abandoned one
                return Workspace(path=path, lock=lock)
        except OSError:
            os.close(lock)
            path.rmdir()
            raise
        os.close(lock)


def _place_in_cache() -> Path:
    """Return the directory of the cache for this, which nobody else can write to."""
    place = cache_directory() / "run"
    make_private(place)
    for path in (cache_directory(), place):
        status = path.lstat()
        if (
            status.st_uid != os.geteuid()
            or status.st_mode & 0o022
            or not stat.S_ISDIR(status.st_mode)
        ):
            raise PermissionError(f"{path} can be written by others")
    return place


def _remove_abandoned(path: Path) -> None:
    """Remove a folder that is this user's alone and that no process holds."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if status.st_uid == os.geteuid() and not status.st_mode & 0o077:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
        finally:
            os.close(handle)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        with (folder / ELSEWHERE).open("rb") as file:
            named = file.read(ELSEWHERE_LIMIT).splitlines()
        for name in named:
            path = Path(os.fsdecode(name))
            if path.name.startswith(OTHERS) and path.lstat().st_uid == os.geteuid():
                shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
