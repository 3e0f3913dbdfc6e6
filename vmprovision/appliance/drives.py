"""The disks of an appliance, and the proof that the appliance sees the right ones."""

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
# Without these, QEMU stops the machine when the host's disk is full, and waits for room.
TELL_FAILURES = {"werror": "report", "rerror": "report"}
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """A disk for the appliance.

    Attributes:
        path: the file on the host.
        format: its format, always given: a probed format is a guest's choice.
        readonly: writes go to an overlay that is thrown away.
        layer: the disk as open files, which are used instead of the path.
        sectors: the size of its sectors in bytes, in which its partition table counts.
    """

    path: Path
    format: str
    readonly: bool = False
    layer: Layer | None = None
    sectors: int = SECTOR

    def describe(self, name: Callable[[int], str]) -> dict[str, Any]:
        """Return QEMU's block node for it.

        Args:
            name: returns the file name by which QEMU opens one of our open files.
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
    if bottom.format == "raw":  # its overlays hardly ever change the table
        file = bottom.file
        sectors = sector_size(
            file.read(2 * LARGE_SECTOR), lambda place, size: file.read(size, place)
        )
    return Drive(
        path=layer.file.path, format=layer.format, readonly=readonly, layer=layer, sectors=sectors
    )


class WrongDiskError(ApplianceError):
    """A disk of the appliance is not the given image."""


@contextlib.contextmanager
def throwaway(drive: Drive, overlay: Path) -> Iterator[Drive]:
    """Give the drive; a read-only one gets an overlay, since mounting may replay a journal.

    Args:
        drive: the drive.
        overlay: the overlay's path; the caller removes it.

    Raises:
        ImageError: the overlay cannot be made.
        CommandError: the overlay cannot be made.
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
    """Refuse a QEMU that has opened other files than those of the drive.

    Raises:
        WrongDiskError: one of the paths leads to another file now.
    """
    opened = set()
    for handle in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            status = handle.stat()
            opened.add((status.st_dev, status.st_ino))
    for file in drive.layer.files() if drive.layer else ():
        if file.identity not in opened:
            raise WrongDiskError(
                f"the appliance has opened another file than {file}",
                hint="nothing was written; keep other users from the image's folder and try again",
            )


def device_name(number: int) -> str:
    """Return the appliance's name for its disk of this number, counted from 0."""
    return f"/dev/sd{string.ascii_lowercase[number]}"


def new_serial() -> str:
    """Return a serial number that no other disk has, of letters as libguestfs requires."""
    return "".join(secrets.choice(string.ascii_letters) for _ in range(SERIAL_LENGTH))


def require_disk(drive: Drive, wanted: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Refuse a disk that is not the drive.

    Args:
        drive: the drive.
        wanted: its device name, serial number and size in bytes.
        found: those of the appliance's disk.

    Raises:
        WrongDiskError: they differ.
    """
    if found != wanted:
        raise WrongDiskError(
            f"the appliance's disk is not {drive.path}: device, serial number and size are "
            f"{found} and should be {wanted}",
            hint="nothing was written; the host may be overloaded: try again later",
        )


def raise_disk_failure(
    failures: Sequence[Mapping[str, Any]], files: Mapping[int, Path], cause: Exception | None = None
) -> None:
    """Raise the failure of the host's disk that QEMU reported, if it reported one.

    A guest's kernel reports success and writes later, and a later ``umount`` does not
    report a write that failed. So QEMU's report counts, whatever the guest reported.

    Args:
        failures: the data of QEMU's events ``BLOCK_IO_ERROR``.
        files: the files of the disks, by their number.
        cause: what failed in the guest.

    Raises:
        ImageSpaceError: the host's disk is full.
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
                hint="the image is unchanged; free some space and run the command again",
            ) from cause
        raise ImageError(
            f"the host could not {failure.get('operation', 'use')} {shown}: {reason}",
            hint="the image is unchanged; check the host's disk with `dmesg`",
        ) from cause
