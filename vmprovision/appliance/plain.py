"""Mount the guest of a plain disk without a search: its first bytes say how it lies.

Plain is: no partition table, a GPT or an MBR; one Linux root on ext2 to ext4 or
XFS; beside it at most swap, ``/boot`` and ``/boot/efi``, boot code, empty
partitions, and filesystems that Linux does not boot from.  One look at the disk, one
mount, and a few files are then all it takes, a tenth of the search in
``roots``; whatever is not plain is left to that, and so is every refusal.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vmprovision.appliance.devicenames import DeviceNames
from vmprovision.appliance.firstbytes import read_volumes
from vmprovision.appliance.mounting import (
    ON_DEMAND,
    Mounting,
    blkid_tags,
    mount_root,
    unix_root,
    wanted_mounts,
)
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.disklayout.partitions import UnclearLayoutError
from vmprovision.errors import InspectionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.appliance.filesystem import ApplianceFilesystem
    from vmprovision.appliance.firstbytes import Volume
    from vmprovision.appliance.mounting import MountedGuest, WantedMount
    from vmprovision.appliance.session import Appliance

log = logging.getLogger(__name__)

MOUNTED_AS_ROOT = ("/", "/sysroot")  # the guest's own, or this one's: libguestfs made the image
# Without any of these names there is nothing that `recognise_system` would know.
OF_A_ROOT = frozenset(("bin", "etc", "gnu", "hurd", "nix", "ostree", "sbin", "usr"))


def mount_plain_guest(appliance: Appliance, disk: str, *, readonly: bool) -> MountedGuest | None:
    """The guest of a plain disk, mounted; None, and nothing mounted, where it is not plain.

    Args:
        appliance: has this one disk.
        disk: its device.
        readonly: mount without writing.
    """
    try:
        volumes = _look_at(appliance, disk)
    except (UnclearLayoutError, ApplianceCallError) as exc:
        log.info("%s is not plain: %s", disk, exc)
        return None
    try:
        return _mount(appliance, volumes, readonly=readonly)
    except (UnclearLayoutError, ApplianceCallError, InspectionError) as exc:
        log.info("%s is not plain: %s", disk, exc)
    appliance.call("umount_all")
    return None


def _look_at(appliance: Appliance, disk: str) -> dict[str, Volume]:
    """What is on the disk, by device.

    Raises:
        UnclearLayoutError: it is not plain.
    """
    volumes = read_volumes(appliance, disk)
    for volume in volumes.values():
        if volume.superblock is None and not volume.is_nothing:
            raise UnclearLayoutError(f"{volume.device} holds nothing plain")
    return volumes


def _mount(appliance: Appliance, volumes: Mapping[str, Volume], *, readonly: bool) -> MountedGuest:
    """The guest, mounted.

    Raises:
        UnclearLayoutError: no root, perhaps several, or more to mount than is plain.
        ApplianceCallError: something cannot be mounted or asked.
        InspectionError: likewise, or the files cannot be read.
    """
    candidates = [volume for volume in volumes.values() if volume.is_unix]
    if not candidates:
        raise UnclearLayoutError("no filesystem that may be Linux's root")
    likely = max(candidates, key=_likelihood)
    # what may turn out to be no root is not written to, not even by being mounted
    looking = readonly or len(candidates) > 1
    files = mount_root(appliance, likely.device, readonly=looking, driver=likely.driver)
    root = unix_root(files, likely.device)
    if root is None or root.system != "linux":
        raise UnclearLayoutError(f"{likely.device} holds no Linux")
    names = DeviceNames(list(volumes), lambda *asked: _tag(appliance, volumes, *asked))
    mounting = Mounting(
        appliance=appliance,
        files=files,
        root=root,
        names=names,
        readonly=readonly,
        driver_of=lambda device: volumes[device].driver,
    )
    wanted = wanted_mounts(files, root, names)
    if any(entry.device and entry.mount.place not in ON_DEMAND for entry in wanted):
        raise UnclearLayoutError("fstab mounts more than /boot")
    others = {volume.device for volume in candidates} - {root.device}
    if others - {entry.device for entry in wanted}:
        raise UnclearLayoutError("there is a filesystem that fstab does not mount")
    if looking and not readonly:
        appliance.call("remount", "/", rw=True)
    guest = mounting.mount_wanted()
    _check_boot(files, guest, wanted, others)
    return guest


def _check_boot(
    files: ApplianceFilesystem, guest: MountedGuest, wanted: list[WantedMount], others: set[str]
) -> None:
    """Raise where a filesystem for ``/boot`` was not mounted, or may be a root too."""
    for entry in wanted:
        place, device = entry.mount.place, entry.device
        if device is None:
            continue
        if guest.mountpoints.get(str(place)) != device:
            raise UnclearLayoutError(f"{device} cannot be mounted on {place}")
        if device in others and OF_A_ROOT & set(files.list_directory(place)):
            raise UnclearLayoutError(f"{device} may be a root too")


def _likelihood(volume: Volume) -> tuple[bool, int]:
    """Of several filesystems, the root says so itself (ext), or is the largest."""
    block = volume.superblock
    return (block is not None and block.last_mounted in MOUNTED_AS_ROOT, volume.partition.size)


def _tag(appliance: Appliance, volumes: Mapping[str, Volume], device: str, tag: str) -> str:
    """What fstab may call a volume by: its UUID or LABEL, or its partition's UUID or name."""
    volume, superblock = volumes[device], volumes[device].superblock
    if tag.startswith("PART_"):
        partition = volume.partition
        return partition.uuid if tag == "PART_ENTRY_UUID" else partition.name
    if superblock is None:
        return ""
    # FAT's label is in its root directory, and the others' tags were not read
    if superblock.kind in ("ntfs", "exfat") or (superblock.kind == "vfat" and tag == "LABEL"):
        return blkid_tags(appliance, device).get(tag, "")
    return superblock.uuid if tag == "UUID" else superblock.label
