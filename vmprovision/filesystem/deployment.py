"""An OSTree guest as it runs, on top of its disk's filesystem.

ostree-prepare-root(1): the deployment that boots becomes ``/``, the disk's own root is
its ``/sysroot``, and all deployments of one operating system share ``/var``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmprovision.filesystem.protocol import PLAIN, ROOT, follow, resolve

if TYPE_CHECKING:
    from pathlib import PurePosixPath

    from vmprovision.filesystem.protocol import Attributes, FileStatus, GuestFilesystem

OWN_PREFIX = ".vmprovision-"  # prefix of files in ``/`` that mark unfinished work


class DeployedFilesystem:
    """A deployment as a guest's root, with what is mounted on it at run time.

    Links are followed as the running guest follows them, before a path is mapped to the
    disk.
    """

    def __init__(
        self, disk: GuestFilesystem, deployment: PurePosixPath, state: PurePosixPath
    ) -> None:
        """Keep the disk's files, the deployment's directory and that of its system's ``/var``."""
        self._disk = disk
        self._direct = _Direct(disk, deployment, state)

    def place_of(self, path: PurePosixPath) -> PurePosixPath:
        """Return where a guest path is on the disk, without following its last link."""
        return self._direct.place_of(resolve(self._direct, path, last=False))

    def lstat(self, path: PurePosixPath) -> FileStatus | None:
        """Implement ``GuestReader.lstat``."""
        parent = follow(self._direct, path.parent)
        if parent is None:
            return None
        real = resolve(self._direct, path, last=False) if path.name == ".." else parent / path.name
        return self._direct.lstat(real)

    def read(self, path: PurePosixPath, *, limit: int, offset: int = 0) -> bytes:
        """Implement ``GuestReader.read``."""
        real = resolve(self._direct, path)
        return self._disk.read(self._direct.place_of(real), limit=limit, offset=offset)

    def load(self, path: PurePosixPath, *, limit: int) -> tuple[FileStatus, bytes]:
        """Implement ``GuestReader.load``."""
        return self._disk.load(self.place_of(path), limit=limit)

    def readlink(self, path: PurePosixPath) -> str:
        """Implement ``GuestReader.readlink``."""
        return self._disk.readlink(self.place_of(path))

    def list_directory(self, path: PurePosixPath) -> list[str]:
        """Implement ``GuestReader.list_directory``."""
        real = follow(self._direct, path)
        return self._disk.list_directory(self._direct.place_of(real)) if real else []

    def label(self, path: PurePosixPath) -> str | None:
        """Implement ``GuestReader.label``."""
        return self._disk.label(self.place_of(path))

    def takes_labels(self) -> bool:
        """Implement ``GuestReader.takes_labels``."""
        return self._disk.takes_labels()

    def write(self, path: PurePosixPath, content: bytes, attributes: Attributes = PLAIN) -> None:
        """Implement ``GuestFilesystem.write``."""
        self._disk.write(self.place_of(path), content, attributes)

    def make_directory(self, path: PurePosixPath, attributes: Attributes = PLAIN) -> None:
        """Implement ``GuestFilesystem.make_directory``."""
        self._disk.make_directory(self.place_of(path), attributes)

    def symlink(self, path: PurePosixPath, target: str, attributes: Attributes = PLAIN) -> None:
        """Implement ``GuestFilesystem.symlink``."""
        self._disk.symlink(self.place_of(path), target, attributes)

    def remove(self, path: PurePosixPath) -> None:
        """Implement ``GuestFilesystem.remove``."""
        self._disk.remove(self.place_of(path))

    def set_label(self, path: PurePosixPath, label: str) -> None:
        """Implement ``GuestFilesystem.set_label``."""
        self._disk.set_label(self.place_of(path), label)


def disk_path(files: GuestFilesystem, path: PurePosixPath) -> PurePosixPath:
    """Return where a guest path is on its disk; only in an OSTree guest it differs."""
    return files.place_of(path) if isinstance(files, DeployedFilesystem) else path


class _Direct:
    """The same mapping for paths without links; ``resolve`` asks for no others."""

    def __init__(
        self, disk: GuestFilesystem, deployment: PurePosixPath, state: PurePosixPath
    ) -> None:
        self._disk = disk
        self._deployment = deployment
        # longest first, because mounts nest
        self._mounts = {
            ROOT / "sysroot": ROOT,
            ROOT / "boot": ROOT / "boot",
            ROOT / "var": state,
        }

    def place_of(self, path: PurePosixPath) -> PurePosixPath:
        for point, source in self._mounts.items():
            if path == point or point in path.parents:
                return source / path.relative_to(point)
        # a deployment's root directory cannot be changed
        if path.parent == ROOT and path.name.startswith(OWN_PREFIX):
            return path
        return self._deployment / path.relative_to(ROOT)

    def lstat(self, path: PurePosixPath) -> FileStatus | None:
        return self._disk.lstat(self.place_of(path))

    def readlink(self, path: PurePosixPath) -> str:
        return self._disk.readlink(self.place_of(path))
