r"""Find the device of the image that a name in the guest's fstab means.

A tag (``UUID=``, ``/dev/disk/by-label/…``) is enough by itself. A name of a disk
(``/dev/vdb2``, ``/dev/disk/by-path/…-part2``) comes from another kernel or host. Other
lines of the guest, best of all the line for ``/``, must say which disk it is; a name that
may be another disk's is not guessed. In ``/dev/disk`` udev escapes a blank as ``\x20``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.errors import InspectionError
from vmprovision.filesystem.protocol import read_text

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader

TagOf = Callable[[str, str], str]  # device, blkid(8)'s name of the tag -> its value, or ""

# The form in fstab, the folder of udev's links, and blkid(8)'s name.
TAGS = (
    ("UUID=", "/dev/disk/by-uuid/", "UUID"),
    ("LABEL=", "/dev/disk/by-label/", "LABEL"),
    ("PARTUUID=", "/dev/disk/by-partuuid/", "PART_ENTRY_UUID"),
    ("PARTLABEL=", "/dev/disk/by-partlabel/", "PART_ENTRY_NAME"),
)
LVM_UUID = "LVM_UUID"  # not blkid's: the identifiers of the group and the volume, joined
CRYPTTAB = PurePosixPath("/etc/crypttab")
_BY_ID = "/dev/disk/by-id/"
_FIRST_DISKS = {"/dev/nvme0n1": "/dev/sda", "/dev/mmcblk0": "/dev/sda"}
_LETTERED = re.compile(r"/dev/(?:[shv]d|xvd)([a-z]{1,3})")
_KERNEL_NAMES = (
    re.compile(r"(/dev/(?:[shv]d|xvd)[a-z]{1,3})(\d{0,3})"),
    re.compile(r"(/dev/(?:nvme\d{1,3}n\d{1,3}|mmcblk\d{1,3}|nbd\d{1,3}))(?:p(\d{1,3}))?"),
)
_LINK = re.compile(r"(/dev/disk/by-[a-z]+/.+?)(?:-part(\d{1,3}))?")
_ESCAPE = re.compile(rb"\\x([0-9a-fA-F]{2})")


def split_partition(name: str) -> tuple[str, str] | None:
    """Return the disk and the partition's number (empty: the disk itself) in a device's name."""
    for pattern in (*_KERNEL_NAMES, _LINK):
        if match := pattern.fullmatch(name):
            return match[1], match[2] or ""
    return None


@dataclass(slots=True)
class DeviceNames:
    """The devices of one image, by the names that a guest may use.

    Attributes:
        devices: the appliance's names for them.
        tag_of: returns a tag of one of them, as blkid(8) finds it.
        aliases: the guest's names of its arrays and encrypted volumes -> the appliance's device.
        disks: the guest's name of a disk -> the appliance's, as far as known.
    """

    devices: Collection[str]
    tag_of: TagOf
    aliases: dict[str, str] = field(default_factory=dict)
    disks: dict[str, str] = field(default_factory=dict)
    _by_tag: dict[str, dict[str, str]] = field(default_factory=dict)

    def learn(self, name: str, device: str) -> None:
        """Learn the guest's name of a disk from one name whose device is known."""
        guest, here = split_partition(name), split_partition(device)
        if guest and here and guest[1] == here[1]:
            self.disks[guest[0]] = here[0]

    def find(self, name: str) -> str | None:
        """Return the appliance's device for a guest's name; None if that is not certain."""
        for prefix, folder, tag in TAGS:
            for start in (prefix, folder):
                if name.startswith(start):
                    value = name.removeprefix(start)
                    return self._tagged(tag, value.strip("\"'") if start == prefix else value)
        name = name.replace("ID=", _BY_ID, 1) if name.startswith("ID=") else name
        name = _unescaped(name)
        return self.aliases.get(name) or self._volume(name) or self._partition(name)

    def guesses(self, name: str) -> Sequence[str]:
        """Return the partitions that a name may mean if its unknown disk is one of these."""
        split = split_partition(_unescaped(name))
        if split is None or split[0] in self.disks or not split[1]:
            return ()
        return [
            device
            for device in self.devices
            if (here := split_partition(device)) and here[1] == split[1]
        ]

    def _tagged(self, tag: str, value: str) -> str | None:
        """Return the device with this tag; only labels are case-sensitive."""
        if tag not in self._by_tag:
            found: dict[str, str] = {}
            for device in self.devices:
                if known := self.tag_of(device, tag):
                    found.setdefault(known if "UUID" not in tag else known.lower(), device)
            self._by_tag[tag] = found
        value = _unescaped(value)
        return self._by_tag[tag].get(value if "UUID" not in tag else value.lower())

    def _volume(self, name: str) -> str | None:
        """Return the logical volume of LVM with this name."""
        if name.startswith(_BY_ID + "dm-uuid-LVM-"):
            return self._tagged(LVM_UUID, name.removeprefix(_BY_ID + "dm-uuid-LVM-"))
        for start in ("/dev/mapper/", _BY_ID + "dm-name-"):
            if name.startswith(start):
                # device-mapper's vg-lv, hyphens inside doubled
                parts = name.removeprefix(start).replace("--", "\0").split("-")
                name = "/dev/" + "/".join(part.replace("\0", "-") for part in parts)
        # of the image's own disks the guest may know others by these names
        return name if name in self.devices and split_partition(name) is None else None

    def _partition(self, name: str) -> str | None:
        """The partition of a disk that is known to be one of the image's."""
        split = split_partition(name)
        if split is None:
            return None
        disk = self.disks.get(split[0])
        if disk is None and not self._knows_kernel_names():
            lettered = _LETTERED.fullmatch(split[0])
            disk = f"/dev/sd{lettered[1]}" if lettered else _FIRST_DISKS.get(split[0])
        device = f"{disk}{split[1]}"
        return device if disk and device in self.devices else None

    def _knows_kernel_names(self) -> bool:
        """Return whether the guest itself tells its kernel's name of the first disk."""
        return any(not name.startswith("/dev/disk/") for name in self.disks)


def crypttab_names(
    reader: GuestReader, unlocked: Mapping[str, str], names: DeviceNames
) -> dict[str, str]:
    """Return the names in the guest's crypttab(5) of the unlocked volumes, with their devices.

    Args:
        reader: the root's files.
        unlocked: encrypted device -> the device of its content.
        names: the names of all devices, including the encrypted ones.
    """
    encrypted = DeviceNames(list(unlocked), names.tag_of, names.aliases, names.disks)
    found = {}
    text = None
    with contextlib.suppress(InspectionError):  # an unreadable crypttab counts as missing
        text = read_text(reader, CRYPTTAB) if unlocked else None
    for line in (text or "").splitlines():
        fields = line.split()
        if line.lstrip().startswith("#") or len(fields) < 2:  # noqa: PLR2004 -- name and device
            continue
        if device := unlocked.get(encrypted.find(fields[1]) or ""):
            for folder in ("/dev/mapper/", _BY_ID + "dm-name-"):
                found[folder + fields[0]] = device
    return found


def _unescaped(name: str) -> str:
    """Return a name of udev's with its escapes decoded."""
    raw = name.encode("utf-8", "surrogateescape")
    plain = _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), raw)
    return plain.decode("utf-8", errors="replace")
