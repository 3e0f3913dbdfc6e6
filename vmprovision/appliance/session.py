"""Open an appliance with disks, and close it for certain.

``open_appliance`` restores the host's saved appliance and attaches the drives. If that
fails, and always in ``launch``, libguestfs boots its own appliance.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from vmprovision.appliance.drives import Drive, device_name
from vmprovision.appliance.handle import ApplianceCallError
from vmprovision.appliance.protocol import Appliance, Appliances
from vmprovision.appliance.snapshot.host import restore
from vmprovision.appliance.snapshot.restore import attach_all
from vmprovision.appliance.stock import prepare_drive, start_stock
from vmprovision.disklayout.partitions import sector_size
from vmprovision.disklayout.superblocks import START_SIZE
from vmprovision.errors import VmprovisionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vmprovision.appliance.snapshot.restore import RestoredAppliance
    from vmprovision.progress import Control

__all__ = ["Appliance", "ApplianceCallError", "Appliances", "Drive", "launch", "open_appliance"]


@contextlib.contextmanager
def open_appliance(drives: Sequence[Drive], *, control: Control) -> Iterator[Appliance]:
    """Give a running appliance with these drives, in their order; close it at the end.

    A restored appliance has no udev, RAID or LVM until ``activate_volumes``. Leaving the
    block without an error unmounts first, and raises if a write could not reach its disk.

    Raises:
        ApplianceError: libguestfs is missing or no appliance starts.
        ApplianceTimeoutError: it did not start in time.
        CancelledError: the caller cancelled.
    """
    restored = restore(control)
    with use_or_open(restored, drives, control=control, opener=launch) as appliance:
        yield appliance


def use_or_open(
    restored: RestoredAppliance | None,
    drives: Sequence[Drive],
    *,
    control: Control,
    opener: Callable[..., contextlib.AbstractContextManager[Appliance]] = open_appliance,
) -> contextlib.AbstractContextManager[Appliance]:
    """Return a restored appliance with these drives, or another if there is none or it fails.

    Args:
        restored: has no drives.
        drives: the disks.
        control: progress and cancellation.
        opener: gives the other one.

    Raises:
        CancelledError: the caller cancelled.
    """
    if restored is not None and attach_all(restored, drives) is not None:
        return use(restored)
    return opener(drives, control=control)


@contextlib.contextmanager
def open_disks(
    opener: Callable[..., contextlib.AbstractContextManager[Appliance]],
    drives: Sequence[Drive],
    control: Control,
) -> Iterator[Appliance]:
    """Give an appliance whose disks have sectors of the size that their tables count in.

    The table says how large the sectors are. A compressed or layered image does not
    show its table on the host, so it is read in the appliance first.

    Args:
        opener: ``open_appliance``, or the ``open`` of a pool.
        drives: the disks.
        control: progress and cancellation.

    Raises:
        ApplianceError: as ``opener``.
        CancelledError: as ``opener``.
    """
    with opener(drives, control=control) as appliance:
        counted = [disk_sectors(appliance, number) for number in range(len(drives))]
        if counted == [drive.sectors for drive in drives]:
            yield appliance
            return
    again = [
        replace(drive, sectors=sectors) for drive, sectors in zip(drives, counted, strict=True)
    ]
    with opener(again, control=control) as appliance:
        yield appliance


def disk_sectors(appliance: Appliance, number: int = 0) -> int:
    """Return the size of the sectors that the partition table of a disk counts in."""

    def read(place: int, size: int) -> bytes:
        return appliance.read_device(device_name(number), place, size)

    return sector_size(read(0, START_SIZE), read)


@contextlib.contextmanager
def launch(drives: Sequence[Drive], *, control: Control) -> Iterator[Appliance]:
    """Give a stock appliance, which libguestfs boots, as ``open_appliance`` does.

    Raises:
        ApplianceError: libguestfs is missing or the appliance did not start.
        ApplianceTimeoutError: it did not start in time.
        CancelledError: the caller cancelled.
    """
    with contextlib.ExitStack() as stack:
        machine = start_stock([prepare_drive(drive, stack) for drive in drives], control)
        yield stack.enter_context(use(machine))


@contextlib.contextmanager
def use(appliance: Appliance) -> Iterator[Appliance]:
    """Give an appliance whose drives are attached; finish the work and close it at the end.

    Raises:
        ImageError: the host could not read or write a file of a drive.
        ApplianceError: a write did not reach its disk.
    """
    try:
        with blaming_the_host(appliance):
            yield appliance
            appliance.finish()
    finally:
        appliance.close()


@contextlib.contextmanager
def blaming_the_host(appliance: Appliance) -> Iterator[None]:
    """Raise the host's fault instead of the failure that it caused in the guest.

    Raises:
        ImageError: QEMU could not read or write a file of the host.
    """
    try:
        yield
    except VmprovisionError as exc:
        appliance.raise_host_fault(exc)
        raise
