"""A stock appliance: libguestfs boots its own, with a monitor of ours beside it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.drives import (
    TELL_FAILURES,
    Drive,
    WrongDiskError,
    device_name,
    new_serial,
    raise_disk_failure,
    require_disk,
    require_open,
    throwaway,
)
from vmprovision.appliance.library import Handle, launch_failure, qemu_program
from vmprovision.appliance.snapshot.hardware import MONITOR, socket_options
from vmprovision.appliance.snapshot.restore import session_folder
from vmprovision.appliance.snapshot.store import bound_qemu
from vmprovision.appliance.watchdog import Watchdog
from vmprovision.disklayout.partitions import SECTOR
from vmprovision.errors import ApplianceError, ApplianceTimeoutError
from vmprovision.host.workspace import workspace
from vmprovision.image.chain import name_backing, virtual_size
from vmprovision.image.diskfile import name_for_others
from vmprovision.qemu.accelerator import choose_accelerator, distrust_kvm
from vmprovision.qemu.monitor import Listener, Monitor

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Sequence
    from pathlib import Path

    from vmprovision.progress import Control

log = logging.getLogger(__name__)

LAUNCH_SECONDS = 240.0  # 8 s on an idle host without KVM; a loaded CI host is far slower
# With KVM it is done in seconds; a KVM that passes its trial may still hang.
KVM_LAUNCH_SECONDS = 30.0
ANSWER_SECONDS = 20.0
LAUNCHES = 3
MONITOR_MODE = f"chardev={MONITOR},mode=control"


class StockAppliance:
    """A machine that libguestfs has booted with its drives.

    Attributes:
        handle: libguestfs's own object, launched.
        watchdog: the time limits of its calls.
    """

    def __init__(
        self,
        qemu: Path,
        drives: Sequence[Drive],
        serials: Sequence[str],
        control: Control,
        *,
        kvm: bool,
    ) -> None:
        """Boot it.

        Raises:
            ApplianceError: it did not start, or not in time.
            CancelledError: the caller cancelled.
        """
        self._workspace = session_folder()
        folder = self._workspace.path
        self._files = dict(enumerate(drive.path for drive in drives))
        self._monitor: Monitor | None = None
        self._handle = Handle(str(folder))
        self.watchdog = Watchdog(str(folder), control)
        self.handle = self._handle.guestfs
        try:
            self.handle.set_tmpdir(str(folder))
            self.handle.set_hv(str(bound_qemu(qemu, "kvm" if kvm else "tcg")))
            if not kvm:
                self.handle.set_backend_setting("force_tcg", "1")
            for drive, serial in zip(drives, serials, strict=True):
                # libguestfs resolves the name to a path: what QEMU has opened is looked at below
                path = name_for_others(drive.layer.file.handle) if drive.layer else str(drive.path)
                self.handle.add_drive_opts(
                    path,
                    format=drive.format,
                    readonly=drive.readonly,
                    label=serial,
                    # an option that libguestfs before 1.42 does not have
                    **({} if drive.sectors == SECTOR else {"blocksize": drive.sectors}),
                )
            self._launch(folder / MONITOR, KVM_LAUNCH_SECONDS if kvm else LAUNCH_SECONDS)
            for drive in drives:
                require_open(self.handle.get_pid(), drive)
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """Check that all that was written is in the files, after the machine was shut down.

        Raises:
            ImageError: the host could not write or read one of them.
        """
        if self._monitor is not None:
            self._monitor.listen_to_the_end()
            raise_disk_failure(self._monitor.disk_failures, self._files)

    def raise_disk_failure(self, cause: Exception) -> None:
        """As ``RestoredAppliance.raise_disk_failure``."""
        if self._monitor is not None:
            self._monitor.catch_up()
            raise_disk_failure(self._monitor.disk_failures, self._files, cause)

    def close(self) -> None:
        """End the machine and remove what it left."""
        self.watchdog.stop()
        self.handle.close()
        if self._monitor is not None:
            self._monitor.close()
        self._workspace.remove()

    def _launch(self, socket: Path, seconds: float) -> None:
        for name, value in TELL_FAILURES.items():
            self.handle.config("-global", f"scsi-hd.{name}={value}")
        for option, value in (socket_options(MONITOR, socket), ("-mon", MONITOR_MODE)):
            self.handle.config(option, value)
        listener = Listener(socket)
        begun = time.monotonic()
        try:
            with self.watchdog.limit(seconds, "launch"):
                self.handle.launch()
            self._monitor = Monitor(listener.accept(ANSWER_SECONDS, lambda: True), ANSWER_SECONDS)
        except RuntimeError as exc:
            self.watchdog.raise_cause()
            raise launch_failure(exc, self._handle.messages) from exc
        finally:
            listener.close()
        log.debug("appliance up in %.1f s", time.monotonic() - begun)


def named(drive: Drive, stack: contextlib.ExitStack) -> Drive:
    """The drive as libguestfs, which takes paths only, can open it: the name is in the overlay."""
    if drive.layer is None:
        return drive
    if drive.readonly:
        folder = stack.enter_context(workspace("drive"))
        drive = stack.enter_context(throwaway(drive, folder / "disk.qcow2"))
    if drive.layer is not None:
        drive.layer.file.require_in_place()
        name_backing(drive.layer)
    return drive


def start_stock(drives: Sequence[Drive], control: Control) -> StockAppliance:
    """Return a stock appliance in which the drives have libguestfs's names, in their order.

    When udev is late in the appliance, its daemon gives the kernel's own names,
    in which the appliance's root is one of the disks and ours come after it.

    Raises:
        ApplianceError: none starts.
        CancelledError: the caller cancelled.
    """
    for attempt in range(LAUNCHES):
        serials = [new_serial() for _ in drives]
        launched = _launch_on_what_works(drives, serials, control)
        try:
            _require_disks(launched.handle, drives, serials)
        except WrongDiskError as exc:
            launched.close()
            if attempt == LAUNCHES - 1:
                raise
            log.warning("%s; starting another appliance", exc.message)
        else:
            return launched
    raise AssertionError  # the last attempt returns or raises


def _require_disks(handle: Any, drives: Sequence[Drive], serials: Sequence[str]) -> None:  # noqa: ANN401 -- untyped library
    """Refuse an appliance whose disks are not the drives in their order."""
    try:
        labelled = handle.list_disk_labels() if drives else {}
        for number, (drive, serial) in enumerate(zip(drives, serials, strict=True)):
            device = labelled.get(serial, "nowhere")
            found = str(handle.blockdev_getsize64(device)) if serial in labelled else ""
            wanted = str(_size_of(handle, drive))
            require_disk(drive, (device_name(number), serial, wanted), (device, serial, found))
    except RuntimeError as exc:
        raise WrongDiskError(f"the appliance's disks cannot be told apart: {exc}") from exc


def _size_of(handle: Any, drive: Drive) -> int:  # noqa: ANN401 -- untyped library
    if drive.layer is None:
        return int(handle.disk_virtual_size(str(drive.path)))
    return virtual_size(drive.layer.file)


def _launch_on_what_works(
    drives: Sequence[Drive], serials: Sequence[str], control: Control
) -> StockAppliance:
    qemu = qemu_program()
    on_kvm = choose_accelerator(qemu).accelerator == "kvm"
    try:
        return StockAppliance(qemu, drives, serials, control, kvm=on_kvm)
    except ApplianceError as exc:
        if not on_kvm:
            raise
        launched = StockAppliance(qemu, drives, serials, control, kvm=False)
        # only now is it known that the fault is KVM's and none of the host or the image
        if isinstance(exc, ApplianceTimeoutError):
            distrust_kvm(qemu, f"an appliance did not start on it: {exc.message}")
        else:
            log.warning("an appliance failed on KVM and started without: %s", exc.message)
        return launched
