"""The stock appliance: libguestfs boots its own, with a second monitor for vmprovision."""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.answers import Described
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
from vmprovision.appliance.handle import CALL_SECONDS, CHUNK, MONITOR, ApplianceCallError, Handle
from vmprovision.appliance.library import qemu_program
from vmprovision.appliance.snapshot.store import bound_qemu
from vmprovision.disklayout.partitions import SECTOR
from vmprovision.filesystem.protocol import SELINUX
from vmprovision.host.workspace import workspace
from vmprovision.image.chain import name_backing, virtual_size
from vmprovision.image.diskfile import name_for_others
from vmprovision.qemu.accelerator import run_accelerated
from vmprovision.qemu.monitor import Listener, Monitor
from vmprovision.qemu.options import CLOCK, socket_options

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from vmprovision.appliance.answers import Part
    from vmprovision.filesystem.protocol import Attributes, FileKind
    from vmprovision.progress import Control
    from vmprovision.qemu.options import Accelerator

log = logging.getLogger(__name__)

LAUNCH_SECONDS = 240.0  # 8 s on an idle host without KVM; a loaded CI host is much slower
# It takes seconds; a KVM that passes its trial may still hang.
KVM_LAUNCH_SECONDS = 30.0
ANSWER_SECONDS = 20.0
LAUNCHES = 3
SEALED = "readonly"  # in what `btrfs subvolume show` says of the flags
MONITOR_MODE = f"chardev={MONITOR},mode=control"


class StockAppliance:
    """A machine that libguestfs has booted with its drives; it meets ``Appliance``.

    Attributes:
        has_volumes: true: libguestfs's own process 1 has started udev, RAID and LVM.
    """

    def __init__(
        self,
        qemu: Path,
        accelerator: Accelerator,
        drives: Sequence[Drive],
        serials: Sequence[str],
        control: Control,
    ) -> None:
        """Boot it.

        Raises:
            ApplianceError: it did not start, or not in time.
            CancelledError: the caller cancelled.
        """
        self.has_volumes = True
        self._files = dict(enumerate(drive.path for drive in drives))
        self._closings: list[Callable[[], None]] = []
        self._monitor: Monitor | None = None
        self._handle = Handle(control)
        guestfs = self._handle.guestfs
        try:
            guestfs.set_hv(str(bound_qemu(qemu, accelerator)))
            if accelerator == "tcg":
                guestfs.set_backend_setting("force_tcg", "1")
                guestfs.set_append(CLOCK)
            for drive, serial in zip(drives, serials, strict=True):
                # libguestfs resolves the name to a path; require_open compares the result
                path = name_for_others(drive.layer.file.handle) if drive.layer else str(drive.path)
                guestfs.add_drive_opts(
                    path,
                    format=drive.format,
                    readonly=drive.readonly,
                    label=serial,
                    # an option that libguestfs before 1.42 does not have
                    **({} if drive.sectors == SECTOR else {"blocksize": drive.sectors}),
                )
            self._launch(KVM_LAUNCH_SECONDS if accelerator == "kvm" else LAUNCH_SECONDS)
            for drive in drives:
                require_open(guestfs.get_pid(), drive)
        except BaseException:
            self.close()
            raise

    def call(self, name: str, *arguments: Any, limit: float = CALL_SECONDS, **options: Any) -> Any:  # noqa: ANN401 -- untyped library
        """Implement ``Appliance.call``."""
        return self._handle.call(name, *arguments, limit=limit, **options)

    def mount(
        self, device: str, driver: str, place: str, *, readonly: bool, options: str = ""
    ) -> None:
        """Implement ``Appliance.mount``."""
        access = ["ro" if readonly else "rw", "noatime", *filter(None, [options])]
        self.call("mount_vfs", ",".join(access), driver, device, place)

    def look(
        self, device: str, driver: str, names: Iterable[str], options: str = ""
    ) -> set[str] | None:
        """Implement ``Appliance.look``: this appliance cannot tell."""

    def read_device(self, device: str, place: int, size: int) -> bytes:
        """Implement ``Appliance.read_device``."""
        return bytes(self.call("pread_device", device, size, place))

    def entries(
        self,
        places: Sequence[str],
        *,
        known: int,  # noqa: ARG002 -- of the Protocol
        wanted: Sequence[str],  # noqa: ARG002
        limit: int,  # noqa: ARG002
    ) -> list[Part]:
        """Implement ``Appliance.entries``: this appliance cannot."""
        return [errno.ENOSYS] * len(places)

    def statuses(self, folder: str, names: Sequence[str]) -> list[Described | int]:
        """Implement ``Appliance.statuses``."""
        if len(names) != 1:
            found = self.call("lstatnslist", folder, list(names))
            return [errno.EIO if each["st_ino"] == -1 else _described(each) for each in found]
        try:
            return [_described(self.call("lstatns", os.path.normpath(f"{folder}/{names[0]}")))]
        except ApplianceCallError as exc:
            return [exc.number or errno.EIO]

    def read_link(self, folder: str, name: str) -> bytes:
        """Implement ``Appliance.read_link``; unlike ``readlink``, this starts no process."""
        (found,) = self.call("readlinklist", folder, [name])
        if not found:
            raise ApplianceCallError("it is not a readable symbolic link", number=errno.EINVAL)
        return str(found).encode()

    def read_label(self, place: str) -> bytes | None:
        """Implement ``Appliance.read_label``; an answer without it is cheaper than an error."""
        try:
            found = self.call("lgetxattrs", place)
        except UnicodeDecodeError:  # in the name of another attribute
            return bytes(self.call("lgetxattr", place, SELINUX))
        return next((bytes(each["attrval"]) for each in found if each["attrname"] == SELINUX), None)

    def read_file(self, path: str, place: int, size: int) -> bytes:
        """Implement ``Appliance.read_file``."""
        return bytes(self.call("pread", path, size, place))

    def is_sealed(self, place: str) -> bool:
        """Implement ``Appliance.is_sealed``."""
        try:
            shown = dict(self.call("btrfs_subvolume_show", place))
        except UnicodeDecodeError as exc:
            raise ApplianceCallError("the name of a subvolume is not UTF-8", number=0) from exc
        return SEALED in str(shown.get("Flags", ""))

    def make(self, place: str, kind: FileKind, content: bytes, attributes: Attributes) -> Described:
        """Implement ``Appliance.make``.

        The owner comes first: changing it clears the set-user-id and set-group-id bits.
        """
        if kind == "directory":
            self.call("mkdir", place)
        elif kind == "symlink":
            self.call("ln_s", content.decode(), place)
        else:
            self.call("write", place, content[:CHUNK])
            for start in range(CHUNK, len(content), CHUNK):
                self.call("write_append", place, content[start : start + CHUNK])
        made = _described(self.call("lstatns", place))
        if (made.uid, made.gid) != (attributes.uid, attributes.gid):
            self.call("lchown", attributes.uid, attributes.gid, place)
        if kind != "symlink" and stat.S_IMODE(made.mode) != attributes.mode:
            self.call("chmod", attributes.mode, place)
        if attributes.label is not None:
            # the binding takes no NUL, and the kernel needs none
            size = len(attributes.label.encode())
            self.call("lsetxattr", SELINUX, attributes.label, size, place)
        return _described(self.call("lstatns", place))

    def remove(self, place: str, kind: FileKind) -> None:
        """Implement ``Appliance.remove``."""
        self.call("rmdir" if kind == "directory" else "rm", place)

    def unmount(self, place: str | None = None) -> None:
        """Implement ``Appliance.unmount``."""
        if place is None:
            self.call("umount_all")
        else:
            self.call("umount", place)

    def map_devices(self, table: str, links: Sequence[str]) -> None:
        """Implement ``Appliance.map_devices``: LVM has created them."""

    def activate_volumes(self) -> None:
        """Implement ``Appliance.activate_volumes``: they run from the start."""

    def before_detaching(self, close: Callable[[], None]) -> None:
        """Implement ``Appliance.before_detaching``."""
        self._closings.append(close)

    def finish(self) -> None:
        """Implement ``Appliance.finish``; the machine is shut down."""
        self.call("set_autosync", False)  # noqa: FBT003 -- libguestfs's; nothing is left to sync
        self.unmount()
        for close in self._closings:
            close()
        self.call("shutdown")
        if self._monitor is not None:
            self._monitor.listen_to_the_end()
            raise_disk_failure(self._monitor.disk_failures, self._files)

    def raise_host_fault(self, exc: Exception) -> None:
        """Implement ``Appliance.raise_host_fault``."""
        self._handle.watchdog.raise_cause()
        if self._monitor is not None:
            self._monitor.catch_up()
            raise_disk_failure(self._monitor.disk_failures, self._files, exc)

    def close(self) -> None:
        """Implement ``Appliance.close``."""
        self._handle.close()
        if self._monitor is not None:
            self._monitor.close()

    def _launch(self, seconds: float) -> None:
        guestfs, socket = self._handle.guestfs, self._handle.folder / MONITOR
        for name, value in TELL_FAILURES.items():
            guestfs.config("-global", f"scsi-hd.{name}={value}")
        for option, value in (socket_options(MONITOR, socket), ("-mon", MONITOR_MODE)):
            guestfs.config(option, value)
        listener = Listener(socket)
        begun = time.monotonic()
        try:
            self._handle.launch(seconds, "launch")
            self._monitor = Monitor(listener.accept(ANSWER_SECONDS, lambda: True), ANSWER_SECONDS)
        finally:
            listener.close()
        log.debug("appliance up in %.1f s", time.monotonic() - begun)


def prepare_drive(drive: Drive, stack: contextlib.ExitStack) -> Drive:
    """Return the drive as libguestfs can open it, which takes paths only.

    Args:
        drive: the drive; its overlay gets the name of its backing file.
        stack: removes what was made for it.

    Raises:
        ImageError: the drive's file was moved or replaced.
    """
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

    If udev is late in the appliance, its daemon uses the kernel's own names. Then the
    appliance's root may be the first disk, so the disks are checked.

    Raises:
        ApplianceError: none starts.
        CancelledError: the caller cancelled.
    """
    qemu = qemu_program()
    for attempt in range(LAUNCHES):
        serials = [new_serial() for _ in drives]

        def boot(accelerator: Accelerator, serials: Sequence[str] = serials) -> StockAppliance:
            return StockAppliance(qemu, accelerator, drives, serials, control)

        appliance = run_accelerated(qemu, boot)
        try:
            _require_disks(appliance, drives, serials)
        except WrongDiskError as exc:
            appliance.close()
            if attempt == LAUNCHES - 1:
                raise
            log.warning("%s; starting another appliance", exc.message)
        except BaseException:
            appliance.close()
            raise
        else:
            return appliance
    raise AssertionError  # the last attempt returns or raises


def _described(found: Mapping[str, int]) -> Described:
    """Return a status of libguestfs."""
    return Described(
        mode=int(found["st_mode"]),
        links=int(found["st_nlink"]),
        uid=int(found["st_uid"]),
        gid=int(found["st_gid"]),
        size=int(found["st_size"]),
    )


def _require_disks(
    appliance: StockAppliance, drives: Sequence[Drive], serials: Sequence[str]
) -> None:
    """Refuse an appliance whose disks are not the drives in their order."""
    try:
        labelled = appliance.call("list_disk_labels") if drives else {}
        for number, (drive, serial) in enumerate(zip(drives, serials, strict=True)):
            device = labelled.get(serial, "nowhere")
            found = str(appliance.call("blockdev_getsize64", device)) if serial in labelled else ""
            wanted = str(_size_of(appliance, drive))
            require_disk(drive, (device_name(number), serial, wanted), (device, serial, found))
    except ApplianceCallError as exc:
        raise WrongDiskError(f"the appliance's disks cannot be identified: {exc.message}") from exc


def _size_of(appliance: StockAppliance, drive: Drive) -> int:
    if drive.layer is None:
        return int(appliance.call("disk_virtual_size", str(drive.path)))
    return virtual_size(drive.layer.file)
