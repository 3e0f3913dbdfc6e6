"""Kinds of storage that are recognised but not opened, each with its next step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmprovision.errors import UnsupportedGuestError, WrongKeyError

if TYPE_CHECKING:
    from vmprovision.appliance.volumes import Layers

FROM_INSIDE = (
    "start the guest and install the agent there: "
    "`vmprovision agent build`, then `guest-agent install` in the guest"
)
BEFORE = "inject before the guest is put on it, or " + FROM_INSIDE
FIRMWARE_RAID = "a member of a RAID of the mainboard's firmware"

# blkid(8)'s kind -> a description, and the next step
FOREIGN = {
    "zfs_member": (
        "a member of a ZFS pool, for which the appliance has no driver",
        FROM_INSIDE,
    ),
    "bcache": (
        "a device of bcache, whose newest data may be on another device, its cache",
        "detach the cache in the running guest (`echo 1 >/sys/block/bcache0/bcache/detach`) "
        "and move the filesystem off bcache, or " + FROM_INSIDE,
    ),
    "drbd": (
        "a device of DRBD; what is written to it below DRBD is not on its peers",
        FROM_INSIDE,
    ),
    "drbdmanage_control_volume": ("the control volume of DRBD Manage", FROM_INSIDE),
    "vdo": ("a volume of VDO (deduplication), which the appliance cannot start", FROM_INSIDE),
    "stratis": ("a member of a Stratis pool, which the appliance cannot start", FROM_INSIDE),
    "BitLocker": ("encrypted by BitLocker, so most likely Windows", "give a disk of a Linux guest"),
    "cs_fvault2": ("encrypted by FileVault, so macOS", "give a disk of a Linux guest"),
    "apfs": ("a container of APFS, so macOS", "give a disk of a Linux guest"),
    "ceph_bluestore": ("an object store of Ceph", "give the disk of the guest's system"),
    "oracleasm": ("a disk of Oracle ASM", "give the disk of the guest's system"),
    "VMFS_volume_member": (
        "a datastore of VMware and not a guest's disk",
        "copy the guest's own VMDK out of it first",
    ),
    "mpath_member": ("a path of a multipath device", BEFORE),
    "DM_integrity": ("a device of dm-integrity, which needs its own settings to start", BEFORE),
    "DM_snapshot_cow": ("the store of a device-mapper snapshot", BEFORE),
    "DM_verity_hash": (
        "the hash tree of dm-verity: the filesystem that it protects must not be changed",
        "use an image without verity, or the image's own way to add files",
    ),
    **dict.fromkeys(
        (
            "adaptec_raid_member",
            "hpt37x_raid_member",
            "hpt45x_raid_member",
            "isw_raid_member",
            "jmicron_raid_member",
            "lsi_mega_raid_member",
            "nvidia_raid_member",
            "promise_fasttrack_raid_member",
            "silicon_medley_raid_member",
            "via_raid_member",
        ),
        (FIRMWARE_RAID, FROM_INSIDE),
    ),
}


def refuse_unreadable(layers: Layers) -> None:
    """Raise an error if a layer that was not opened is why no operating system was found.

    Raises:
        WrongKeyError: no key opens an encrypted volume.
        UnsupportedGuestError: a volume is encrypted and has no key, or its kind is not
            supported.
    """
    locked = layers.locked
    if layers.tried:
        raise WrongKeyError(
            f"{layers.tried[0]} is encrypted, and none of the given keys opens it",
            hint=f"give the right one with --key {layers.tried[0]}:file:PATH",
        )
    if locked:
        raise UnsupportedGuestError(
            f"{', '.join(locked)}: encrypted with LUKS, "
            "and no other filesystem holds an operating system",
            hint=f"give the key with --key {locked[0]}:file:PATH, or with --key-file PATH",
        )
    for device, cause in layers.unusable.items():
        raise UnsupportedGuestError(
            f"{device} is a member of an MD array, and {cause}",
            hint="give the array's other disks with --disk, or start the guest with all of them",
        )
    for device, kind in {**layers.filesystems, **layers.others}.items():
        if found := FOREIGN.get(kind):
            what, hint = found
            raise UnsupportedGuestError(f"{device} is {what}", hint=hint)
