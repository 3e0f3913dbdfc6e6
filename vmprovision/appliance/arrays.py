"""MD arrays of the guest: an array is used only if all its active members are here.

A write to one part of a mirror does not reach the other part. When the guest starts
with both, it may take the old one as current and overwrite the new one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.appliance.session import ApplianceCallError
from vmprovision.disklayout.mdraid import Member, missing_members, parse_member

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmprovision.appliance.session import Appliance

log = logging.getLogger(__name__)

MEMBER = "linux_raid_member"  # blkid(8)'s name


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrays:
    """The arrays that were found.

    Attributes:
        names: the guest's name of an array (``/dev/md/root``) -> the appliance's device.
        unusable: member -> why its array must not be used.
    """

    names: Mapping[str, str]
    unusable: Mapping[str, str]


def examine_arrays(appliance: Appliance, members: Iterable[str]) -> Arrays:
    """Compare the members' superblocks, and stop the arrays that lack members.

    Args:
        appliance: the appliance, in which arrays were started, complete or not.
        members: the devices that are members of arrays.
    """
    found: dict[str, dict[str, Member]] = {}
    for device in members:
        if member := _read_member(appliance, device):
            found.setdefault(member.array, {})[device] = member
    names: dict[str, str] = {}
    unusable: dict[str, str] = {}
    running = _running(appliance) if found else {}
    for array, devices in found.items():
        if cause := _fault_of(list(devices.values())):
            unusable |= dict.fromkeys(devices, cause)
            if array in running:
                appliance.call("md_stop", running[array])
        elif array in running:
            names |= dict.fromkeys(_names_of(devices.values()), running[array])
    return Arrays(names=names, unusable=unusable)


def _read_member(appliance: Appliance, device: str) -> Member | None:
    def read(offset: int, length: int) -> bytes:
        return bytes(appliance.call("pread_device", device, length, offset))

    try:
        return parse_member(read, int(appliance.call("blockdev_getsize64", device)))
    except ApplianceCallError as exc:
        log.info("%s cannot be read: %s", device, exc.message)
        return None


def _running(appliance: Appliance) -> dict[str, str]:
    """Return the device of each started array, by UUID."""
    arrays = {}
    for device in appliance.call("list_md_devices"):
        details = appliance.call("md_detail", device)
        arrays[str(details.get("uuid", "")).replace(":", "").lower()] = str(device)
    return arrays


def _fault_of(members: list[Member]) -> str:
    """Return why an array must not be used; empty if it may."""
    if any(member.is_reshaped for member in members):
        return "it is being reshaped"
    if count := missing_members(members):
        return f"{count} of its {members[0].slots} members is missing and was active before"
    return ""


def _names_of(members: Iterable[Member]) -> set[str]:
    """Return mdadm(8)'s possible names for an array: its number or name, with or without a host."""
    names = set()
    for member in members:
        name = PurePosixPath(member.name.rpartition(":")[2]).name
        if name:
            names.add(f"/dev/md/{name}")
        if name.isdecimal():
            names.add(f"/dev/md{name}")
    return names
