"""Find the operating systems on the drives of an appliance, and mount the one to work on.

libguestfs's own ``inspect_os`` is not used: it takes most of its time for facts
that we do not need, and it finds nothing where ``/etc`` or ``/bin`` is an
absolute link, or where only ``/usr/lib/os-release`` is there.
"""

from __future__ import annotations

import logging
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.appliance.devicenames import LVM_UUID, DeviceNames, crypttab_names
from vmprovision.appliance.filesystem import ApplianceFilesystem
from vmprovision.appliance.foreign import FOREIGN, refuse_unreadable
from vmprovision.appliance.mounting import (
    MountedGuest,
    Mounting,
    Root,
    blkid_tag,
    mount_root,
    unix_root,
)
from vmprovision.appliance.plain import mount_plain_guest
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.appliance.volumes import open_layers
from vmprovision.errors import (
    InspectionError,
    NoOperatingSystemError,
    SeveralOperatingSystemsError,
    UnsupportedGuestError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmprovision.appliance.session import Appliance
    from vmprovision.appliance.volumes import Layers
    from vmprovision.filesystem import GuestReader
    from vmprovision.keyfile import Key

log = logging.getLogger(__name__)

# Filesystems that hold no tree of files, or none that Linux boots from.
SKIPPED = ("swap", "unknown", "LVM2_member", "linux_raid_member", "zfs_member")
MBR_BSD = (0xA5, 0xA6, 0xA9)  # FreeBSD, OpenBSD, NetBSD
BTRFS_PREFIX = "btrfsvol:"
SOLE_DISK = "/dev/sda"  # libguestfs's name for the only drive of an appliance


def mount_guest(
    appliance: Appliance,
    *,
    wanted: str | None,
    readonly: bool,
    disk: str | None = None,
    keys: Sequence[Key] = (),
) -> MountedGuest:
    """The image's Linux guest, mounted at the appliance's guest root.

    Args:
        appliance: holds the image as its drive.
        wanted: the device of the root to use where there are several.
        readonly: mount without writing.
        disk: the appliance's only disk; where there is one only, a plain layout is known
            by its first bytes, and nothing is searched.
        keys: of its encrypted volumes.

    Raises:
        NoOperatingSystemError: nothing here boots.
        SeveralOperatingSystemsError: more than one root and none wanted.
        UnsupportedGuestError: Windows, BSD, Hurd, encrypted without a key, or hibernated.
        WrongKeyError: no key opens what is encrypted.
    """
    if disk is not None and wanted is None:
        guest = mount_plain_guest(appliance, disk, readonly=readonly)
        if guest is not None:
            return guest
    return _mount_found_guest(appliance, wanted, keys, readonly=readonly)


def _mount_found_guest(
    appliance: Appliance, wanted: str | None, keys: Sequence[Key], *, readonly: bool
) -> MountedGuest:
    """The guest, by libguestfs's list of all filesystems and a look into each."""
    layers = open_layers(appliance, keys)
    filesystems = layers.filesystems
    roots = [root for device in filesystems if (root := _root_on(appliance, device, filesystems))]
    root = _choose(appliance, _merge_btrfs(roots), layers, wanted)
    if any(kind == "swsuspend" for kind in filesystems.values()):
        raise UnsupportedGuestError(
            f"the guest {root.name} is hibernated: it holds its filesystems in memory",
            hint="start it, shut it down, and inject then",
        )
    files = mount_root(appliance, root.device, readonly=readonly)
    # subvolumes have no tags of their own
    devices = [device for device in filesystems if not device.startswith(BTRFS_PREFIX)]
    names = DeviceNames(devices, lambda *asked: _tag(appliance, *asked), dict(layers.array_names))
    names.aliases.update(crypttab_names(files, layers.unlocked, names))
    mounting = Mounting(appliance=appliance, files=files, root=root, names=names, readonly=readonly)
    return mounting.mount_wanted()


def _tag(appliance: Appliance, device: str, tag: str) -> str:
    if tag != LVM_UUID:
        return blkid_tag(appliance, device, tag)
    try:
        volume = str(appliance.call("lvuuid", device)).replace("-", "")
        group = str(appliance.call("vguuid", device.split("/")[2])).replace("-", "")
    except ApplianceCallError:  # no logical volume
        return ""
    return group + volume


def _root_on(appliance: Appliance, device: str, filesystems: Mapping[str, str]) -> Root | None:
    kind = filesystems[device]
    if kind in SKIPPED or kind in FOREIGN or kind == "swsuspend":
        return None
    if kind == "ufs":
        return Root(device=device, system="bsd", name="BSD")
    try:
        appliance.call("mount_ro", device, "/")
    except ApplianceCallError as exc:
        log.info("cannot mount %s (%s): %s", device, kind, exc.message)
        return None
    try:
        reader = ApplianceFilesystem(appliance)
        if kind in ("ntfs", "vfat", "exfat"):
            return _windows_root(reader, device)
        return unix_root(reader, device)
    except InspectionError as exc:
        log.info("cannot read %s: %s", device, exc.message)
        return None
    finally:
        appliance.call("umount_all")


def _windows_root(reader: GuestReader, device: str) -> Root | None:
    names = [name for name in reader.list_directory(PurePosixPath("/")) if _is_windows(name)]
    for name in names:
        inside = {entry.lower() for entry in reader.list_directory(PurePosixPath("/") / name)}
        if inside & {"system32", "system"}:
            return Root(device=device, system="windows", name="Windows")
    return None


def _is_windows(name: str) -> bool:
    return name.lower() in ("windows", "winnt")


def _merge_btrfs(roots: Sequence[Root]) -> list[Root]:
    """The roots with btrfs's snapshots of the same system left out.

    ``list_filesystems`` names the default subvolume by its plain device, so where
    the plain device is a root, that is the one that boots; else the one that the
    system's own fstab names, whatever older roots and snapshots are beside it.
    """
    kept: dict[str, Root] = {}
    for root in roots:
        device, subvolume = _split_btrfs(root.device)
        other = kept.get(device)
        if other is not None:
            log.info("%s and %s are subvolumes of one filesystem", root.device, other.device)
        named = subvolume is not None and subvolume == root.subvolume
        if other is None or subvolume is None or (named and other.device != device):
            kept[device] = root
    return list(kept.values())


def _split_btrfs(device: str) -> tuple[str, str | None]:
    """``btrfsvol:/dev/sda2/@`` as ``/dev/sda2`` and ``@``; the subvolume None for other devices.

    A logical volume's device has a directory more: ``/dev/VG/LV``.
    """
    if not device.startswith(BTRFS_PREFIX):
        return device, None
    parts = PurePosixPath(device.removeprefix(BTRFS_PREFIX)).parts
    length = 3 if re.fullmatch(r"[shv]d[a-z]+\d*|md\d+", parts[2]) else 4
    return str(PurePosixPath(*parts[:length])), "/".join(parts[length:])


def _choose(
    appliance: Appliance,
    roots: Sequence[Root],
    layers: Layers,
    wanted: str | None,
) -> Root:
    if wanted is not None:
        for root in roots:
            if root.device == wanted:
                return _linux(root)
        known = ", ".join(root.device for root in roots) or "none"
        raise NoOperatingSystemError(
            f"there is no operating system on {wanted}", hint=f"roots found: {known}"
        )
    systems = [root for root in roots if root.system == "linux"] or list(roots)
    if len(systems) == 1:
        return _linux(systems[0])
    if systems:
        listed = ", ".join(f"{root.device} ({root.name})" for root in systems)
        raise SeveralOperatingSystemsError(
            f"the image holds {len(systems)} operating systems: {listed}",
            hint="choose one with --root DEVICE",
        )
    refuse_unreadable(appliance, layers)
    if _has_bsd_partition(appliance):
        raise UnsupportedGuestError(
            "the image holds a BSD system", hint="only Linux guests can be injected into"
        )
    seen = ", ".join(f"{device} ({kind})" for device, kind in layers.filesystems.items()) or "none"
    raise NoOperatingSystemError(
        "no filesystem of the image holds an operating system", hint=f"filesystems seen: {seen}"
    )


def _linux(root: Root) -> Root:
    if root.system == "linux":
        return root
    names = {"windows": "Windows", "bsd": "a BSD system", "hurd": "GNU/Hurd"}
    raise UnsupportedGuestError(
        f"{root.device} holds {names[root.system]}", hint="only Linux guests can be injected into"
    )


def _has_bsd_partition(appliance: Appliance) -> bool:
    for partition in appliance.call("list_partitions"):
        disk = appliance.call("part_to_dev", partition)
        number = appliance.call("part_to_partnum", partition)
        try:
            if appliance.call("part_get_parttype", disk) == "msdos":
                if appliance.call("part_get_mbr_id", disk, number) in MBR_BSD:
                    return True
            elif str(appliance.call("part_get_gpt_type", disk, number)).startswith("516E7C"):
                return True  # the FreeBSD family of GPT types
        except ApplianceCallError:
            continue
    return False
