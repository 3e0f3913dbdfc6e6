"""Subvolumes of btrfs, named as libguestfs does: ``btrfsvol:/dev/sda2/@``."""

from __future__ import annotations

import logging
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.appliance.session import ApplianceCallError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmprovision.appliance.mounting import Root
    from vmprovision.appliance.session import Appliance

log = logging.getLogger(__name__)

BTRFS = "btrfs"
_PREFIX = "btrfsvol:"


def name_subvolume(device: str, path: str) -> str:
    """Return the name of a subvolume of a device."""
    return f"{_PREFIX}{device}/{path}"


def split_subvolume(name: str) -> tuple[str, str | None]:
    """Split ``btrfsvol:/dev/sda2/@`` into ``/dev/sda2`` and ``@``; return None for other devices.

    The device of a logical volume has one directory more: ``/dev/VG/LV``.
    """
    if not name.startswith(_PREFIX):
        return name, None
    parts = PurePosixPath(name.removeprefix(_PREFIX)).parts
    length = 3 if re.fullmatch(r"[shv]d[a-z]+\d*|md\d+", parts[2]) else 4
    return str(PurePosixPath(*parts[:length])), "/".join(parts[length:])


def subvolume_options(name: str) -> tuple[str, str]:
    """Return the device node of a device or subvolume, and the options that mount it."""
    node, subvolume = split_subvolume(name)
    return node, f"subvol={subvolume}" if subvolume else ""


def list_subvolumes(appliance: Appliance, device: str) -> list[str]:
    """Return the names of a btrfs's subvolumes, in the order of their numbers.

    The filesystem is mounted only for the duration of the call.

    Raises:
        ApplianceCallError: it cannot be mounted or read.
    """
    appliance.mount(device, BTRFS, "/", readonly=True)
    try:
        found = appliance.call("btrfs_subvolume_list", "/")
    except UnicodeDecodeError as exc:
        raise ApplianceCallError("the name of a subvolume is not valid UTF-8", number=0) from exc
    finally:
        appliance.unmount()
    paths = [str(each["btrfssubvolume_path"]) for each in found]
    if any("," in path for path in paths):  # a comma would end the option that names the subvolume
        raise ApplianceCallError("the name of a subvolume has a comma", number=0)
    return [name_subvolume(device, path) for path in paths]


def merge_btrfs(roots: Sequence[Root]) -> list[Root]:
    """Return the roots without btrfs's other subvolumes and snapshots of the same system.

    The plain device is the default subvolume. If it is a root, it is the one that
    boots. Otherwise the one that the system's own fstab names boots, even if older
    roots and snapshots are beside it.
    """
    kept: dict[str, Root] = {}
    for root in roots:
        device, subvolume = split_subvolume(root.device)
        other = kept.get(device)
        if other is not None:
            log.info("%s and %s are subvolumes of one filesystem", root.device, other.device)
        named = subvolume is not None and subvolume == root.subvolume
        if other is None or subvolume is None or (named and other.device != device):
            kept[device] = root
    return list(kept.values())
