"""Private folders for work in progress, removed with the process that made them.

Each is in the cache, else in the temporary directory.  Its name is unpredictable and
only its owner can enter it.  The process locks the folder itself as long as it lives,
so that the next process recognises and removes what a killed one left.

Folders that another program made for the same work are removed as well if the file
``elsewhere`` in the folder names them: libguestfs always makes root's sockets in ``/tmp``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.host.cache import cache_directory, make_private, require_private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PREFIX = "vmprovision-"
SHORTEST = Path("/tmp")  # noqa: S108 -- if other paths are too long; the name is random
ELSEWHERE = "elsewhere"
OTHERS = "libguestfs"  # how the names of folders elsewhere begin
ELSEWHERE_LIMIT = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """A private folder.

    Attributes:
        path: the folder.
        lock: a descriptor of the folder, which holds its lock.
    """

    path: Path
    lock: int

    def remove(self) -> None:
        """Remove the folder and the folders elsewhere that it names."""
        _remove(self.path)
        os.close(self.lock)


def make_workspace(purpose: str, suits: Callable[[Path], bool] = lambda _: True) -> Workspace:
    """Make a private folder; remove those that killed processes left.

    Args:
        purpose: a word of its name.
        suits: whether a folder with this path can be used; if not, another place is tried.

    Raises:
        OSError: no folder can be made.
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
        OSError: no folder can be made.
    """
    made = make_workspace(purpose)
    try:
        yield made.path
    finally:
        made.remove()


def make_workspace_in(place: Path, prefix: str) -> Workspace:
    """Make a private folder in a directory; remove abandoned ones with the same prefix.

    Raises:
        OSError: no folder can be made there, or the filesystem cannot lock directories.
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
            if os.fstat(lock).st_nlink:  # else another process took it for an abandoned one
                return Workspace(path=path, lock=lock)
        except OSError:
            os.close(lock)
            path.rmdir()
            raise
        os.close(lock)


def _place_in_cache() -> Path:
    """Return the cache's directory for workspaces, which no other user can write to."""
    place = cache_directory() / "run"
    make_private(place)
    require_private(cache_directory(), place)
    return place


def _remove_abandoned(path: Path) -> None:
    """Remove a folder that only this user can enter and that no process holds."""
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
