"""Parts of an image that cannot be read, where the guest's real root may be.

An encrypted partition, a ZFS pool or a filesystem with a feature unknown to the
appliance's kernel may hold the system that boots; the readable root beside it may be a
rescue system. Swap, boot code, FAT and NTFS hold no root of Linux. Devices that the
readable root itself opens or mounts are its data: fstab(5), crypttab(5), mdadm.conf(5)
and ZFS's list of pools name them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.appliance.devicenames import CRYPTTAB
from vmprovision.appliance.foreign import FOREIGN
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.appliance.volumes import LUKS
from vmprovision.disklayout.lvmlabel import parse_label
from vmprovision.disklayout.partitions import UnclearLayoutError
from vmprovision.filesystem.protocol import read_text, resolved_file
from vmprovision.mounts import read_fstab

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from vmprovision.appliance.devicenames import DeviceNames, TagOf
    from vmprovision.appliance.session import Appliance
    from vmprovision.appliance.volumes import Layers
    from vmprovision.errors import InspectionError
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.mounts.fstab import FstabLine

# Filesystems that Linux may have as its root, as blkid(8) names them.
ROOT_KINDS = (
    *("ext2", "ext3", "ext4", "ext4dev", "xfs", "btrfs", "f2fs", "bcachefs", "reiserfs"),
    *("reiser4", "jfs", "nilfs2", "squashfs", "erofs", "ubifs"),
)
RAID_FILES = tuple(PurePosixPath(path) for path in ("/etc/mdadm/mdadm.conf", "/etc/mdadm.conf"))
POOLS = PurePosixPath("/etc/zfs/zpool.cache")
POOLS_LIMIT = 1 << 20
LOG_LINES = 60
ZFS, BCACHE, RAID, LVM = "zfs_member", "bcache", "linux_raid_member", "LVM2_member"
# Kinds that are not opened and never hold a root of Linux.
NO_ROOT = (
    *("BitLocker", "cs_fvault2", "apfs", "ceph_bluestore", "oracleasm", "VMFS_volume_member"),
    *("drbdmanage_control_volume", "DM_snapshot_cow", "DM_verity_hash"),
)
_FEATURES = ("unsupported", "unknown", "feature", "version", "couldn't mount")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A device whose files cannot be read, and that may hold a root.

    Attributes:
        kind: what is on it, as blkid(8) names it.
        why: the reason, as a clause.
        hint: the next step.
        name: the name of its volume group or pool, if it has one.
        is_closed: whether it is a layer around a filesystem.
    """

    device: str
    kind: str
    why: str
    hint: str
    name: str = ""
    is_closed: bool = True

    def __str__(self) -> str:
        """Name it for a message."""
        return f"{self.device} ({self.kind}: {self.why})"


def find_closed(appliance: Appliance, layers: Layers, tag_of: TagOf) -> list[Unreadable]:
    """Return the layers that were not opened and may hold a root."""
    kinds = {**layers.filesystems, **layers.others}
    found = [
        Unreadable(
            device=device,
            kind=LUKS,
            why="it is encrypted",
            hint=f"give the key with --key {device}:file:PATH",
        )
        for device in layers.locked
    ]
    found += [
        Unreadable(
            device=device, kind=RAID, why=why, hint="give the array's other disks with --disk"
        )
        for device, why in layers.unusable.items()
    ]
    for device, kind in kinds.items():
        if kind in FOREIGN and kind not in NO_ROOT:
            why, hint = FOREIGN[kind]
            name = tag_of(device, "LABEL") if kind == ZFS else ""
            found.append(Unreadable(device=device, kind=kind, why=why, hint=hint, name=name))
    members = [device for device, kind in kinds.items() if kind == LVM]
    return found + (_incomplete_groups(appliance, members) if members else [])


def _incomplete_groups(appliance: Appliance, members: Iterable[str]) -> list[Unreadable]:
    """Return the volume groups that lack a disk, and the physical volumes whose group is unknown.

    Any volume of such a group may be incomplete.
    """
    try:
        groups = appliance.call("vgs_full")
    except ApplianceCallError:  # without LVM, or it stumbles over damaged metadata
        groups = []
    incomplete = [
        Unreadable(
            device=f"/dev/{group['vg_name']}",
            kind=LVM,
            why="a disk of this volume group is missing",
            hint="give the guest's other disks with --disk",
            name=str(group["vg_name"]),
        )
        for group in groups
        if str(group["vg_attr"])[3:4] == "p"
    ]
    known = {uuid for group in groups for uuid in _members_of(appliance, str(group["vg_name"]))}
    return incomplete + [
        Unreadable(
            device=device,
            kind=LVM,
            why=f"LVM does not find its volume group: {fault}",
            hint="repair its metadata with vgcfgrestore(8)",
            is_closed=False,
        )
        for device in members
        if (fault := _fault_of_member(appliance, device, known))
    ]


def _members_of(appliance: Appliance, group: str) -> list[str]:
    """Return the UUIDs of a group's physical volumes."""
    try:
        return [str(uuid) for uuid in appliance.call("vgpvuuids", group)]
    except ApplianceCallError:
        return []


def _fault_of_member(appliance: Appliance, device: str, known: Collection[str]) -> str:
    """Return why LVM knows no group of a physical volume; empty if it does, or it has none."""

    def read(place: int, size: int) -> bytes:
        return appliance.read_device(device, place, size)

    try:
        label = parse_label(read, int(appliance.call("blockdev_getsize64", device)))
    except (ApplianceCallError, UnclearLayoutError) as exc:
        return str(exc)
    return "" if label.uuid in known or not label.text else "its metadata is not understood"


def unmountable(appliance: Appliance, device: str, kind: str, message: str) -> Unreadable | None:
    """Return a filesystem that mount(8) refused; None if no root of Linux can be on it."""
    if kind not in ROOT_KINDS:
        return None
    said = _kernel_log(appliance, device)
    if "unknown filesystem type" in message:
        why, hint = "the appliance's kernel has no driver for it", "use a host whose kernel has one"
    elif any(word in said.lower() for word in _FEATURES):
        why = said
        hint = (
            "if the filesystem is newer than this host, use one with a newer kernel; "
            "else check it with fsck"
        )
    else:
        why, hint = said or message, "check the guest's filesystem with fsck"
    return Unreadable(
        device=device, kind=kind, why=f"it cannot be mounted: {why}", hint=hint, is_closed=False
    )


def unreadable_files(device: str, kind: str, error: InspectionError) -> Unreadable | None:
    """Return a mounted filesystem whose files cannot be read; None if it holds no root."""
    if kind not in ROOT_KINDS:
        return None
    return Unreadable(device=device, kind=kind, why=error.message, hint=error.hint, is_closed=False)


def _kernel_log(appliance: Appliance, device: str) -> str:
    """Return the last line of the kernel's log about a device, without its time, or ""."""
    try:
        text = str(appliance.call("debug", "sh", ["dmesg"]))
    except (ApplianceCallError, UnicodeDecodeError):
        return ""
    name = device.rpartition("/")[2] if device.startswith("/dev/sd") else "dm-"
    lines = [line for line in text.splitlines()[-LOG_LINES:] if name in line]
    return lines[-1].rpartition("] ")[2][:200] if lines else ""


def unclaimed(
    unreadable: Iterable[Unreadable], reader: GuestReader, names: DeviceNames
) -> list[Unreadable]:
    """Return the devices that the readable root does not name as its data."""
    lines = [line for line in read_fstab(reader) if line.mountpoint != "/"]
    return [each for each in unreadable if not _is_claimed(each, reader, names, lines)]


def _is_claimed(
    each: Unreadable, reader: GuestReader, names: DeviceNames, lines: list[FstabLine]
) -> bool:
    sources = [line.source for line in lines]
    if each.kind == LUKS:
        return each.device in {names.find(named) for named in _crypttab(reader)}
    if each.kind == RAID:
        return _is_listed_raid(reader, names.tag_of(each.device, "UUID"))
    if each.kind == ZFS:
        return _is_listed_pool(reader, each.name)
    mapped = f"/dev/mapper/{each.name.replace('-', '--')}-"
    begins = {LVM: (f"{each.device}/", mapped), BCACHE: ("/dev/bcache",)}
    if each.kind in begins:
        return any(source.startswith(begins[each.kind]) for source in sources)
    return each.device in {names.find(source) for source in sources}


def _is_listed_pool(reader: GuestReader, name: str) -> bool:
    """Return whether the guest imports a pool of this name when it boots."""
    pools = resolved_file(reader, POOLS)
    known = reader.read(pools, limit=POOLS_LIMIT) if pools else b""
    return bool(name) and name.encode("utf-8", "surrogateescape") in known


def _crypttab(reader: GuestReader) -> list[str]:
    """Return the encrypted devices that the guest opens besides its root."""
    lines = (read_text(reader, CRYPTTAB) or "").split("\n")
    fields = [line.split() for line in lines if not line.lstrip().startswith("#")]
    opened = {words[0]: words[1] for words in fields if len(words) > 1}
    roots = [line.source for line in read_fstab(reader) if line.mountpoint == "/"]
    return [device for name, device in opened.items() if f"/dev/mapper/{name}" not in roots]


def _is_listed_raid(reader: GuestReader, identifier: str) -> bool:
    """Return whether the guest's mdadm.conf names an array by this UUID."""
    wanted = identifier.replace("-", "").lower()
    texts = [read_text(reader, path) or "" for path in RAID_FILES]
    named = [re.findall(r"UUID=([0-9a-fA-F:-]{32,40})", text) for text in texts]
    return any(each.replace(":", "").lower() == wanted for found in named for each in found)
