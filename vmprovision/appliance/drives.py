"""A disk for an appliance, and the proof that the appliance's disk is that one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import string
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision.disklayout.partitions import LARGE_SECTOR, SECTOR, sector_size
from vmprovision.errors import ApplianceError, ImageError, ImageSpaceError
from vmprovision.host.command import run
from vmprovision.image.chain import Layer, make_overlay
from vmprovision.image.diskfile import DiskFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

SERIAL_LENGTH = 16
# Without these, QEMU stops the machine where the host's disk is full, and waits for room.
TELL_FAILURES = {"werror": "report", "rerror": "report"}
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """A disk for the appliance.

    Attributes:
        path: the file on the host.
        format: its format, always stated: a guessed format is a guest's choice.
        readonly: writes go to a throwaway snapshot.
        layer: the disk as open files, which are used in place of the path.
        sectors: the size of its sectors in bytes, by which a GPT counts.
    """

    path: Path
    format: str
    readonly: bool = False
    layer: Layer | None = None
    sectors: int = SECTOR

    def describe(self, name: Callable[[int], str]) -> dict[str, Any]:
        """Return QEMU's block node for it.

        Args:
            name: gives the file name by which QEMU opens one of our open files.
        """
        if self.layer is not None:
            return self.layer.describe(name)
        file = {"driver": "file", "filename": str(self.path.absolute())}
        return {"driver": self.format, "file": file}


def drive_of(layer: Layer, *, readonly: bool = False) -> Drive:
    """Return the drive for a disk of open files."""
    bottom = layer
    while bottom.backing is not None:
        bottom = bottom.backing
    sectors = SECTOR
    if bottom.format == "raw":  # what is above it hardly ever has another table
        sectors = sector_size(bottom.file.read(2 * LARGE_SECTOR))
    return Drive(
        path=layer.file.path, format=layer.format, readonly=readonly, layer=layer, sectors=sectors
    )


class WrongDiskError(ApplianceError):
    """A disk of the appliance is not the image that it was given."""


@contextlib.contextmanager
def throwaway(drive: Drive, overlay: Path) -> Iterator[Drive]:
    """Give the drive, or for one that is not to be written to an overlay: a journal may want to be.

    Args:
        drive: the drive.
        overlay: where to make the overlay; the caller removes it.

    Raises:
        ImageError: it cannot be made.
        CommandError: likewise.
    """
    if not drive.readonly:
        yield drive
    elif drive.layer is None:
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", drive.format]
        run([*create, "-b", drive.path.absolute(), overlay], timeout=60)
        yield Drive(path=overlay, format="qcow2", sectors=drive.sectors)
    else:
        handle = os.open(overlay, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            file = DiskFile(path=overlay, handle=handle)
            make_overlay(file, drive.layer)
            over = Layer(file=file, format="qcow2", backing=drive.layer)
            yield replace(drive_of(over), sectors=drive.sectors)
        finally:
            os.close(handle)


def require_open(process: int, drive: Drive) -> None:
    """Refuse a QEMU that has not opened the very files of the drive.

    Raises:
        WrongDiskError: another file has taken the path of one of them.
    """
    opened = set()
    for handle in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            status = handle.stat()
            opened.add((status.st_dev, status.st_ino))
    for file in drive.layer.files() if drive.layer else ():
        if file.identity not in opened:
            raise WrongDiskError(
                f"the appliance has another file open than {file}",
                hint="nothing was written; keep others from the image's folder and try again",
            )


def device_name(number: int) -> str:
    """What the appliance calls its disk of this number, counted from 0."""
    return f"/dev/sd{string.ascii_lowercase[number]}"


def new_serial() -> str:
    """A serial number that no other disk has; letters only, as libguestfs wants its labels."""
    return "".join(secrets.choice(string.ascii_letters) for _ in range(SERIAL_LENGTH))


def require_disk(drive: Drive, wanted: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Refuse a disk that is not the drive: by device name, serial number and size in bytes.

    Raises:
        WrongDiskError: one of them differs.
    """
    if found != wanted:
        raise WrongDiskError(
            f"the appliance's disk is not {drive.path}: device, serial number and size are "
            f"{found} and should be {wanted}",
            hint="nothing was written; the host may be overloaded: try again when it is less so",
        )


def raise_disk_failure(
    failures: Sequence[Mapping[str, Any]], files: Mapping[int, Path], cause: Exception | None = None
) -> None:
    """Raise what QEMU told of the host's disk, if it told anything.

    A guest's kernel writes long after it has said that it did, and does not tell a later
    ``umount`` of what failed; so nothing that was seen in the guest counts against this.

    Args:
        failures: the data of QEMU's events ``BLOCK_IO_ERROR``.
        files: the files of the disks, by the number that their names end with.
        cause: what failed in the guest.

    Raises:
        ImageSpaceError: there was no room for what was written.
        ImageError: a file could not be read or written.
    """
    for failure in failures:
        name = str(failure.get("node-name") or failure.get("device") or "")
        number = re.fullmatch(r"(?:disk|hd)(\d+)", name)
        file = files.get(int(number[1])) if number else None
        shown = str(file or "a temporary file of the appliance")
        reason = str(failure.get("reason", "unknown error"))
        if failure.get("nospace") or reason in FULL:
            raise ImageSpaceError(
                f"the host's disk is full: {shown} could not be written ({reason})",
                hint="the image is as it was; free some space and run the command again",
            ) from cause
        raise ImageError(
            f"the host could not {failure.get('operation', 'use')} {shown}: {reason}",
            hint="the image is as it was; `dmesg` may say what is wrong with the host's disk",
        ) from cause
