"""One libguestfs appliance: started, called under time limits, closed for certain.

``open_appliance`` restores the host's saved appliance and plugs the drives in;
where that cannot be, and with ``launch`` always, libguestfs boots its own.
libguestfs's bare ``RuntimeError`` becomes ``ApplianceError`` here, once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from vmprovision.appliance.drives import Drive, device_name
from vmprovision.appliance.snapshot.host import restore
from vmprovision.appliance.snapshot.restore import RestoredAppliance, attach_all
from vmprovision.appliance.stock import StockAppliance, named, start_stock
from vmprovision.disklayout.partitions import LARGE_SECTOR, sector_size
from vmprovision.errors import (
    ApplianceEndedError,
    ApplianceError,
    ApplianceTimeoutError,
    VmprovisionError,
)
from vmprovision.qemu.monitor import GONE, GONE_HINT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from vmprovision.progress import Control

__all__ = ["Appliance", "ApplianceCallError", "Appliances", "Drive", "launch", "open_appliance"]

log = logging.getLogger(__name__)

CALL_SECONDS = 300.0


class Appliance:
    """A running appliance; every call has a time limit and can be cancelled.

    One thread at a time uses an appliance; many appliances run side by side.

    Attributes:
        has_volumes: whether udev, RAID and LVM are at work in it.
    """

    def __init__(self, machine: RestoredAppliance | StockAppliance) -> None:
        """Take a machine that runs."""
        self._machine = machine
        self._handle = machine.handle
        self._watchdog = machine.watchdog
        self._restored = machine if isinstance(machine, RestoredAppliance) else None
        self._closings: list[Callable[[], None]] = []
        self._has_mapped = False
        self.has_volumes = self._restored is None

    def call(self, name: str, *arguments: Any, limit: float = CALL_SECONDS, **options: Any) -> Any:  # noqa: ANN401 -- untyped library
        """The result of one libguestfs API call, by its name in guestfs(3).

        Raises:
            ApplianceError: the call failed; ``number`` carries the guest's errno.
            ApplianceTimeoutError: it took more than ``limit`` seconds.
            CancelledError: the caller cancelled.
        """
        with self._watchdog.limit(limit, name):
            try:
                return getattr(self._handle, name)(*arguments, **options)
            except RuntimeError as exc:
                self._watchdog.raise_cause()
                if name != "shutdown" and not self._handle.is_ready():
                    raise ApplianceEndedError(GONE, hint=GONE_HINT) from exc
                raise ApplianceCallError(f"appliance: {exc}", number=_number_in(str(exc))) from exc

    def mount(
        self, device: str, driver: str, place: str, *, readonly: bool, options: str = ""
    ) -> None:
        """Mount a filesystem of the guest, of which no access times are written.

        Args:
            device: its node in the appliance.
            driver: the kernel's filesystem.
            place: a directory of the guest, free of links.
            readonly: do not write to it.
            options: of the filesystem's own.

        Raises:
            ApplianceCallError: it cannot be mounted.
        """
        if self._restored is None or self.has_volumes:
            access = ["ro" if readonly else "rw", "noatime", *filter(None, [options])]
            self.call("mount_vfs", ",".join(access), driver, device, place)
            return
        with _as_call():
            self._restored.mount(device, driver, place, readonly=readonly, options=options)

    def look(
        self, device: str, driver: str, names: Iterable[str], options: str = ""
    ) -> set[str] | None:
        """Return which names are in the root directory of a filesystem that is not mounted.

        None where this appliance cannot tell.

        Raises:
            ApplianceCallError: the filesystem cannot be mounted or read.
        """
        if self._restored is None or self.has_volumes:
            return None
        with _as_call():
            return self._restored.look(device, driver, names, options)

    def unmount(self, place: str | None = None) -> None:
        """Unmount what is at a place of the guest, or all of the guest.

        Raises:
            ApplianceError: something is still in use.
        """
        if self._restored is not None and not self.has_volumes:
            self._restored.unmount(place)
        elif place is None:
            self.call("umount_all")
        else:
            self.call("umount", place)

    def map_devices(self, table: str, links: Sequence[str]) -> None:
        """Make the guest's logical volumes, where LVM has not made them already.

        Args:
            table: of device-mapper, in the concise form of dmsetup(8).
            links: for each device of the table its name below ``/dev``.

        Raises:
            ApplianceCallError: one cannot be made.
        """
        if self._restored is not None and not self.has_volumes and not self._has_mapped:
            with _as_call():
                self._restored.map_devices(table, links)
            self._has_mapped = True

    def activate_volumes(self) -> None:
        """See to it that udev, RAID, LVM and dynamic disks work, as a stock appliance has them.

        Raises:
            ApplianceError: they cannot be started.
        """
        if self._restored is not None and not self.has_volumes:
            self._restored.activate_volumes()
            self._has_mapped = False
            self.has_volumes = True

    def before_detaching(self, close: Callable[[], None]) -> None:
        """Have this done when the guest is unmounted and its disks are still there."""
        self._closings.append(close)

    def finish(self) -> None:
        """Unmount the guest and let go of the disks; all that was written is in their files then.

        Raises:
            ApplianceError: a write did not reach its disk.
        """
        self.call("set_autosync", False)  # noqa: FBT003 -- libguestfs's; nothing is left to sync
        self.unmount()
        for close in self._closings:
            close()
        if self._restored is not None and self._has_mapped:
            self._restored.unmap_devices()
        if self._restored is None:
            self.call("shutdown")
        self._machine.finish()

    @contextlib.contextmanager
    def blaming_the_host(self) -> Iterator[None]:
        """Raise, instead of what failed in the guest, that a disk of the host was the cause.

        Raises:
            ImageError: QEMU could not read or write a file of the host.
        """
        try:
            yield
        except VmprovisionError as exc:
            self._watchdog.raise_cause()
            self._machine.raise_disk_failure(exc)
            raise


class Appliances(Protocol):
    """What appliances are taken from: each in its own way as ``open_appliance``."""

    def open(
        self, drives: Sequence[Drive], *, control: Control
    ) -> contextlib.AbstractContextManager[Appliance]:
        """A running appliance with these drives, in their order."""


class ApplianceCallError(ApplianceError):
    """A libguestfs call failed.

    Attributes:
        number: errno as the appliance saw it, 0 where there is none.
    """

    def __init__(self, message: str, *, number: int) -> None:
        """Keep the errno beside libguestfs's own message."""
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def _as_call() -> Iterator[None]:
    """Raise what the attendant cannot do as a call that failed."""
    try:
        yield
    except (ApplianceEndedError, ApplianceTimeoutError):
        raise
    except ApplianceError as exc:
        raise ApplianceCallError(exc.message, number=0) from exc


# The Python binding does not offer guestfs_last_errno; the guest daemon ends its
# messages with strerror(3), in the C locale.
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}


def _number_in(message: str) -> int:
    return _NUMBERS.get(message.rpartition(": ")[2], 0)


@contextlib.contextmanager
def open_appliance(drives: Sequence[Drive], *, control: Control) -> Iterator[Appliance]:
    """A running appliance with these drives, in their order; closed at the end.

    It is the host's saved one where that restores, and then has no udev, RAID or
    LVM until ``activate_volumes``; else a stock one.  Leaving the block without an
    error flushes and shuts the appliance down first, and a write that could not
    reach the disk raises.

    Raises:
        ApplianceError: libguestfs is missing or no appliance starts.
        ApplianceTimeoutError: it did not start in time.
        CancelledError: the caller cancelled.
    """
    restored = _restore(drives, control)
    if restored is None:
        with launch(drives, control=control) as appliance:
            yield appliance
        return
    with use(restored) as appliance:
        yield appliance


@contextlib.contextmanager
def open_disks(
    opener: Callable[..., contextlib.AbstractContextManager[Appliance]],
    drives: Sequence[Drive],
    control: Control,
) -> Iterator[Appliance]:
    """As ``open_appliance``, with disks whose sectors are as large as their tables say.

    A GPT counts in sectors, and only it says how large they are.  So a disk whose
    file does not show its content is looked at in the appliance first.

    Args:
        opener: ``open_appliance``, or that of a pool.
        drives: the disks.
        control: progress and cancellation.

    Raises:
        ApplianceError: as ``opener``.
        CancelledError: likewise.
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
    """The size of the sectors that the table of a disk counts in."""
    return sector_size(appliance.call("pread_device", device_name(number), 2 * LARGE_SECTOR, 0))


@contextlib.contextmanager
def use(machine: RestoredAppliance | StockAppliance) -> Iterator[Appliance]:
    """A machine whose drives are plugged in, as an appliance; closed at the end.

    Raises:
        ImageError: the host could not read or write a file of a drive.
        ApplianceError: a write did not reach its disk.
    """
    appliance = Appliance(machine)
    try:
        with appliance.blaming_the_host():
            yield appliance
            appliance.finish()
    finally:
        machine.close()


@contextlib.contextmanager
def launch(drives: Sequence[Drive], *, control: Control) -> Iterator[Appliance]:
    """As ``open_appliance``, with a stock appliance, which libguestfs boots.

    Raises:
        ApplianceError: libguestfs is missing or the appliance did not start.
        ApplianceTimeoutError: it did not start in time.
        CancelledError: the caller cancelled.
    """
    with contextlib.ExitStack() as stack:
        machine = start_stock([named(drive, stack) for drive in drives], control)
        yield stack.enter_context(use(machine))


def _restore(drives: Sequence[Drive], control: Control) -> RestoredAppliance | None:
    """The saved appliance with the drives; None where a stock one is to be tried instead."""
    restored = restore(control)
    if restored is None or attach_all(restored, drives) is None:
        return None
    return restored
