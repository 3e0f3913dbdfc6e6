"""The files of templates and VMs, all below the server's state folder.

QEMU runs as its own user.  So a base image is readable by QEMU's group, and a VM's disk
belongs to QEMU.  Everything else belongs to the server.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmprovision.errors import CommandError, ImageSpaceError
from vmprovision.host.command import run
from vmprovision.proof.machine.console import PANIC, last_lines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONSOLE_BYTES = 64 << 10
CONSOLE_LINES = 20
COPY_SECONDS = 3600.0
CREATE_SECONDS = 120.0
FOLDER_MODE = 0o711  # QEMU may enter, but not list
BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class VmFiles:
    """The paths of one VM's files."""

    folder: Path

    @property
    def disk(self) -> Path:
        """The VM's own image."""
        return self.folder / "disk.qcow2"

    @property
    def console(self) -> Path:
        """The guest's console output."""
        return self.folder / "console.log"

    def console_tail(self) -> bytes:
        """Return the last bytes that the guest printed."""
        with contextlib.suppress(OSError), self.console.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - CONSOLE_BYTES))
            return file.read(CONSOLE_BYTES)
        return b""

    def console_lines(self, count: int = CONSOLE_LINES) -> list[str]:
        """Return the last lines that the guest printed, safe to show."""
        return last_lines(self.console_tail(), count)

    def has_panicked(self) -> bool:
        """Return whether the guest's kernel printed a panic."""
        return PANIC in self.console_tail()


def vm_files(state: Path, vm_id: str) -> VmFiles:
    """Return the paths of a VM's files."""
    return VmFiles(folder=state / "vms" / vm_id)


def template_folder(state: Path, template_id: str) -> Path:
    """Return the folder of a template's files."""
    return state / "templates" / template_id


def make_folder(folder: Path) -> None:
    """Make the folder of a template or VM, and its parents.

    Raises:
        ImageSpaceError: there is too little free space.
    """
    with disk_failures(folder):
        for path in (folder.parent.parent, folder.parent, folder):
            path.mkdir(mode=FOLDER_MODE, exist_ok=True, parents=True)
            path.chmod(FOLDER_MODE)


def make_overlay(disk: Path, base: Path, base_format: str) -> bool:
    """Make a disk on a base image, complete or not at all; return whether it did not exist.

    Raises:
        ImageSpaceError: there is no room.
    """
    if disk.exists():
        return False
    options = ["-q", "-f", "qcow2", "-F", base_format, "-b", str(base)]
    with _written_whole(disk) as partial:
        run(["qemu-img", "create", *options, partial], timeout=CREATE_SECONDS)
        partial.chmod(0o600)
    return True


def copy_image(source: Path, target: Path) -> None:
    """Copy an image, complete or not at all.

    Raises:
        ImageSpaceError: there is no room.
    """
    with _written_whole(target) as partial:
        run(["cp", "--reflink=auto", "--sparse=always", source, partial], timeout=COPY_SECONDS)


@contextlib.contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """Give the name of a file that becomes the target; remove what killed servers left there.

    Raises:
        ImageSpaceError: there is no room.
    """
    begun = f".{target.name}."
    with disk_failures(target):
        for path in target.parent.iterdir():
            if path.name.startswith(begun):
                path.unlink(missing_ok=True)
        partial = target.with_name(f"{begun}{os.getpid()}")
        try:
            yield partial
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def allow_qemu(path: Path, owner: tuple[int, int] | None) -> None:
    """Let QEMU read a read-only file: by its group, or else by everybody."""
    if owner is not None and os.geteuid() == 0:
        os.chown(path, 0, owner[1])
        path.chmod(0o440)
    else:
        path.chmod(0o444)


def give_to_qemu(path: Path, owner: tuple[int, int] | None) -> None:
    """Let QEMU write to a VM's disk."""
    if owner is not None and os.geteuid() == 0:
        os.chown(path, *owner)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def remove_folder(folder: Path) -> None:
    """Remove a folder with everything in it, if it exists.

    Raises:
        OSError: something cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


@contextlib.contextmanager
def disk_failures(path: Path) -> Iterator[None]:
    """Turn a full disk, in the block or in a program that it runs, into an error with the path.

    Raises:
        ImageSpaceError: the host's disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, CommandError) as exc:
        full = os.strerror(errno.ENOSPC)
        if isinstance(exc, CommandError) and full not in exc.stderr:
            raise
        reason = exc.strerror if isinstance(exc, OSError) else full
        raise ImageSpaceError(
            f"{path} cannot be written: {reason}",
            hint=f"make room: df -h {path.parent} shows how much there is",
        ) from exc
