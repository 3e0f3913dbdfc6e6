"""Find the operating systems on an appliance's drives, and mount the chosen one.

libguestfs's own ``inspect_os`` is not used. It spends most of its time on facts that
are not needed here. It also finds no system if ``/etc`` or ``/bin`` is an absolute
link, or if only ``/usr/lib/os-release`` exists.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.appliance.bootedsubvolume import mount_booted
from vmprovision.appliance.devicenames import LVM_UUID, DeviceNames, crypttab_names
from vmprovision.appliance.firstbytes import blkid_tags, read_contents
from vmprovision.appliance.foreign import FOREIGN, refuse_unreadable
from vmprovision.appliance.mounting import (
    MountedGuest,
    Mounting,
    Root,
    mount_device,
    mount_root,
    unix_root,
)
from vmprovision.appliance.plain import may_hold_root, mount_plain_guest
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.appliance.subvolumes import merge_btrfs
from vmprovision.appliance.unreadable import (
    Unreadable,
    find_closed,
    unclaimed,
    unmountable,
    unreadable_files,
)
from vmprovision.appliance.volumes import LUKS, open_layers
from vmprovision.disklayout.partitions import UnclearLayoutError
from vmprovision.disklayout.subvolumes import BTRFS, split_subvolume
from vmprovision.errors import (
    InspectionError,
    NoOperatingSystemError,
    SeveralOperatingSystemsError,
    UnsupportedGuestError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmprovision.appliance.firstbytes import Contents
    from vmprovision.appliance.session import Appliance
    from vmprovision.appliance.volumes import Layers
    from vmprovision.disklayout.keyfile import Key
    from vmprovision.errors import VmprovisionError
    from vmprovision.filesystem.protocol import GuestReader

log = logging.getLogger(__name__)

# Kinds without a tree of files, or from which Linux does not boot.
SKIPPED = ("swap", "unknown", "LVM2_member", "linux_raid_member", LUKS)
LISTED_LIMIT = 20
GPT_BSD = "516e7c"  # FreeBSD's partition types begin so
MBR_BSD = (0xA5, 0xA6, 0xA9)  # FreeBSD, OpenBSD, NetBSD
SOLE_DISK = "/dev/sda"  # libguestfs's name for an appliance's only drive


def mount_guest(
    appliance: Appliance,
    *,
    wanted: str | None,
    readonly: bool,
    disk: str | None = None,
    keys: Sequence[Key] = (),
) -> MountedGuest:
    """Mount the image's Linux guest at the appliance's guest root, and return it.

    Args:
        appliance: an appliance with the image as its drive.
        wanted: the device of the root to use, if there are several.
        readonly: mount without writing.
        disk: the appliance's only disk, or None. The structures of a single disk usually show
            where the root is, without a search of every filesystem.
        keys: the keys of its encrypted volumes.

    Raises:
        NoOperatingSystemError: the image has no operating system.
        SeveralOperatingSystemsError: there are several roots and ``wanted`` names none.
        UnsupportedGuestError: Windows, BSD, Hurd, encrypted without a key, or hibernated.
        WrongKeyError: no key opens an encrypted volume.
    """
    contents = _find_contents(appliance, disk)
    if contents is not None and disk is not None and wanted is None:
        guest = mount_plain_guest(appliance, contents, readonly=readonly)
        if guest is not None:
            return guest
    layers = open_layers(appliance, contents, keys)
    return mount_found_guest(appliance, wanted, layers, readonly=readonly)


def _find_contents(appliance: Appliance, disk: str | None) -> Contents | None:
    """Return the disks' content, or None (with a log entry) if libguestfs must search them.

    Raises:
        InspectionError: a partition table is endless.
    """
    try:
        disks = [disk] if disk is not None else appliance.call("list_devices")
        return read_contents(appliance, disks)
    except (UnclearLayoutError, ApplianceCallError) as exc:
        log.info("libguestfs searches the disks, which takes longer: %s", exc)
        return None


def mount_found_guest(
    appliance: Appliance, wanted: str | None, layers: Layers, *, readonly: bool
) -> MountedGuest:
    """Search each filesystem for a root, and mount the guest.

    Raises:
        VmprovisionError: as ``mount_guest``.
    """
    filesystems = layers.filesystems
    seen = [
        _look_into(appliance, device, kind, layers.driver(device))
        for device, kind in filesystems.items()
    ]
    roots = [each for each in seen if isinstance(each, Root)]
    search = _Search(
        appliance=appliance,
        layers=layers,
        every=roots,
        roots=merge_btrfs(roots),
        unreadable=[each for each in seen if isinstance(each, Unreadable)],
    )
    root = search.choose(wanted)
    if any(kind == "swsuspend" for kind in filesystems.values()):
        raise UnsupportedGuestError(
            f"the guest {root.name} is hibernated, with filesystem data in its saved memory",
            hint="start it, shut it down, and inject again",
        )
    files = mount_root(appliance, root.device, readonly=readonly, driver=layers.driver(root.device))
    names = search.names()
    names.aliases.update(crypttab_names(files, layers.unlocked, names))
    mounting = Mounting(
        appliance=appliance,
        files=files,
        root=root,
        names=names,
        readonly=readonly,
        driver_of=layers.driver,
    )
    if filesystems.get(root.device) == BTRFS:
        return mount_booted(mounting, is_chosen=wanted is not None)
    return mounting.mount_wanted()


def _look_into(
    appliance: Appliance, device: str, kind: str, driver: str
) -> Root | Unreadable | None:
    """Return the root on a device, or why it cannot be read, or None if it has none."""
    if kind in SKIPPED or kind in FOREIGN or kind == "swsuspend":
        return None
    if kind == "ufs":
        return Root(device=device, system="bsd", name="BSD")
    try:
        return _mounted_root(appliance, device, kind, driver)
    except ApplianceCallError as exc:
        if driver:  # mount(8) describes the fault better
            return _look_into(appliance, device, kind, "")
        log.info("cannot mount %s (%s): %s", device, kind, exc.message)
        return unmountable(appliance, device, kind, exc.message)
    except InspectionError as exc:
        log.info("cannot read %s: %s", device, exc.message)
        return unreadable_files(device, kind, exc)


def _mounted_root(appliance: Appliance, device: str, kind: str, driver: str) -> Root | None:
    """Return the root on a device; mount the device only for the duration of the call.

    Raises:
        ApplianceCallError: it cannot be mounted.
        InspectionError: it cannot be read.
    """
    if driver and not may_hold_root(appliance, device, driver):
        return None
    files = mount_device(appliance, device, readonly=True, driver=driver)
    try:
        if kind in ("ntfs", "vfat", "exfat"):
            return _windows_root(files, device)
        return unix_root(files, device)
    finally:
        appliance.unmount()


def _windows_root(reader: GuestReader, device: str) -> Root | None:
    names = [name for name in reader.list_directory(PurePosixPath("/")) if _is_windows(name)]
    for name in names:
        inside = {entry.lower() for entry in reader.list_directory(PurePosixPath("/") / name)}
        if inside & {"system32", "system"}:
            return Root(device=device, system="windows", name="Windows")
    return None


def _is_windows(name: str) -> bool:
    return name.lower() in ("windows", "winnt")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """The findings of a search, from which one root is chosen.

    Attributes:
        every: all roots, also the subvolumes and snapshots that do not boot.
        roots: those that may boot.
    """

    appliance: Appliance
    layers: Layers
    every: Sequence[Root]
    roots: Sequence[Root]
    unreadable: Sequence[Unreadable]
    known: dict[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def devices(self) -> list[str]:
        """The devices with tags of their own; subvolumes have none."""
        found = self.layers.filesystems
        return [device for device in found if split_subvolume(device)[1] is None]

    def names(self, *more: str) -> DeviceNames:
        """The guest's possible names for these, and more of the image's devices."""
        return DeviceNames([*self.devices, *more], self.tag, dict(self.layers.array_names))

    def tag(self, device: str, tag: str) -> str:
        """Return a tag of a device from blkid(8) or LVM; each is queried once."""
        contents = self.layers.contents
        if contents is not None and device in contents.volumes:
            return contents.tag(self.appliance, device, tag)
        if tag == LVM_UUID:
            return _lvm_uuid(self.appliance, device)
        if device not in self.known:
            self.known[device] = blkid_tags(self.appliance, device)
        return self.known[device].get(tag, "")

    def choose(self, wanted: str | None) -> Root:
        """Return the wanted root, or the only one.

        Raises:
            InspectionError: there is no such root, or it cannot be read; the subclass
                says which.
            SeveralOperatingSystemsError: there are more, or a device that cannot be
                read may have one.
            UnsupportedGuestError: there is no Linux, or every candidate is encrypted.
        """
        if wanted is not None:
            return self._wanted(wanted)
        roots = without_parts(self.roots, self.names)
        systems = [root for root in roots if root.system == "linux"] or roots
        if len(systems) > 1:
            listed = ", ".join(f"{root.device} ({root.name})" for root in systems)
            raise SeveralOperatingSystemsError(
                f"the image holds {len(systems)} operating systems: {listed}",
                hint="choose one with --root DEVICE",
            )
        closed = find_closed(self.appliance, self.layers, self.tag)
        unreadable = [*self.unreadable, *closed]
        if not systems:
            raise self._nothing(unreadable)
        if systems[0].system == "linux" and unreadable:
            self._refuse_doubt(systems[0], unreadable)
        return _linux(systems[0])

    def _wanted(self, wanted: str) -> Root:
        for root in self.every:
            if root.device == wanted:
                return _linux(root)
        for each in self.unreadable:
            if each.device == wanted:
                raise InspectionError(f"no files can be read on {each}", hint=each.hint)
        known = ", ".join(root.device for root in self.roots) or "none"
        raise NoOperatingSystemError(
            f"there is no operating system on {wanted}", hint=f"roots found: {known}"
        )

    def _refuse_doubt(self, root: Root, unreadable: Sequence[Unreadable]) -> None:
        """Raise an error if a device that cannot be read may have the guest's real root."""
        driver = self.layers.driver(root.device)
        files = mount_root(self.appliance, root.device, readonly=True, driver=driver)
        try:
            names = self.names(*(each.device for each in unreadable))
            left = unclaimed(unreadable, files, names)
        finally:
            self.appliance.unmount()
        if left:
            listed = ", ".join(map(str, left))
            raise SeveralOperatingSystemsError(
                f"the image holds an operating system on {root.device} ({root.name}), "
                f"and perhaps another one that cannot be read: {listed}",
                hint=f"choose --root {root.device} if that is the one that boots; to read "
                f"{left[0].device}: {left[0].hint}",
            )

    def _nothing(self, unreadable: Sequence[Unreadable]) -> VmprovisionError:
        """Return the error for an image without a readable root."""
        if damaged := [each for each in unreadable if not each.is_closed]:
            return InspectionError(
                "no readable filesystem has an operating system, and "
                f"{', '.join(map(str, damaged))}",
                hint=damaged[0].hint,
            )
        refuse_unreadable(self.layers)
        if unreadable:
            return UnsupportedGuestError(
                "no readable filesystem has an operating system, and "
                f"{', '.join(map(str, unreadable))}",
                hint=unreadable[0].hint,
            )
        if self._has_bsd_partition():
            return UnsupportedGuestError(
                "the image holds a BSD system", hint="only Linux guests can be injected into"
            )
        listed = [f"{device} ({kind})" for device, kind in self.layers.filesystems.items()]
        return NoOperatingSystemError(
            "no filesystem of the image has an operating system",
            hint=f"filesystems seen: {', '.join(listed[:LISTED_LIMIT]) or 'none'}",
        )

    def _has_bsd_partition(self) -> bool:
        if self.layers.contents is None:
            return _finds_bsd_partition(self.appliance)
        return any(kind.startswith(GPT_BSD) for kind in self.layers.contents.types)


def _lvm_uuid(appliance: Appliance, device: str) -> str:
    """Return the UUIDs of a logical volume's group and its own, as device-mapper joins them."""
    try:
        volume = str(appliance.call("lvuuid", device)).replace("-", "")
        group = str(appliance.call("vguuid", device.split("/")[2])).replace("-", "")
    except ApplianceCallError:  # no logical volume
        return ""
    return group + volume


def without_parts(roots: Sequence[Root], names_of: Callable[[], DeviceNames]) -> list[Root]:
    """Return the roots that no other root's fstab mounts, such as a ``/usr``.

    A root whose own fstab mounts it at ``/`` stays, because two systems may mount each
    other.
    """
    parts = set()
    for root in roots:
        names = names_of()
        for line in root.fstab:
            if line.mountpoint == "/":
                names.learn(line.source, root.device)
        mounted = {names.find(line.source) for line in root.fstab if line.mountpoint != "/"}
        parts |= mounted - {root.device}
    return [root for root in roots if root.device not in parts or _is_own(root, names_of())]


def _is_own(root: Root, names: DeviceNames) -> bool:
    """Return whether a root's own fstab mounts it at ``/``."""
    return any(
        names.find(line.source) == root.device for line in root.fstab if line.mountpoint == "/"
    )


def _linux(root: Root) -> Root:
    if root.system == "linux":
        return root
    names = {"windows": "Windows", "bsd": "a BSD system", "hurd": "GNU/Hurd"}
    raise UnsupportedGuestError(
        f"{root.device} holds {names[root.system]}", hint="only Linux guests can be injected into"
    )


def _finds_bsd_partition(appliance: Appliance) -> bool:
    for partition in appliance.call("list_partitions"):
        disk = appliance.call("part_to_dev", partition)
        number = appliance.call("part_to_partnum", partition)
        try:
            if appliance.call("part_get_parttype", disk) == "msdos":
                if appliance.call("part_get_mbr_id", disk, number) in MBR_BSD:
                    return True
            elif str(appliance.call("part_get_gpt_type", disk, number)).lower().startswith(GPT_BSD):
                return True
        except ApplianceCallError:
            continue
    return False
