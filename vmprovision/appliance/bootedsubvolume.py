"""Mount the subvolume of btrfs that the guest's boot menu makes the root.

The kernel's option ``rootflags=`` names it (see ``rootoptions``). Without one, the
filesystem's default subvolume boots. What fstab says of ``/`` comes too late to change it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from vmprovision.appliance.mounting import mount_root, unix_root
from vmprovision.disklayout.subvolumes import name_subvolume, split_subvolume
from vmprovision.errors import InspectionError, SeveralOperatingSystemsError, printable
from vmprovision.inspection.bootmenu import named_subvolumes
from vmprovision.inspection.watched import WatchedReader

if TYPE_CHECKING:
    from vmprovision.appliance.mounting import MountedGuest, Mounting

log = logging.getLogger(__name__)

TOP_LEVEL = 5  # the number of the tree above all subvolumes
LISTED_LIMIT = 5


def mount_booted(mounting: Mounting) -> MountedGuest:
    """Mount a guest whose root is mounted, or, if its menu names one, another subvolume of it.

    Args:
        mounting: the guest, whose root is on btrfs.

    Raises:
        InspectionError: the menu names a subvolume that does not exist or holds no Linux.
        SeveralOperatingSystemsError: the menus name several, and not the mounted one.
        ApplianceCallError: it cannot be mounted.
    """
    guest = mounting.mount_wanted()
    named = _named_root(mounting)
    if named is None:
        return guest
    log.info("the boot menu makes %s the root instead of %s", named, mounting.root.device)
    appliance = mounting.appliance
    appliance.unmount()
    driver = mounting.driver_of(named)
    files = mount_root(appliance, named, readonly=mounting.readonly, driver=driver)
    root = unix_root(files, named)
    if root is None or root.system != "linux":
        raise InspectionError(
            f"the boot menu makes {named} the root, and no Linux is there", hint=_HINT
        )
    again = replace(mounting, files=files, root=root, mountpoints={}, done={})
    guest = again.mount_wanted()
    if (other := _named_root(again)) is not None:
        raise SeveralOperatingSystemsError(
            f"the boot menu seen from {mounting.root.device} makes {named} the root, "
            f"and the one seen from there makes it {other}",
            hint=_HINT,
        )
    return guest


_HINT = "choose the root with --root DEVICE, as btrfsvol:/dev/sda2/@"


def _named_root(mounting: Mounting) -> str | None:
    """Return the subvolume that boots instead of the mounted one, or None if there is none."""
    node, here = split_subvolume(mounting.root.device)

    def is_elsewhere(device: str) -> bool:
        return (mounting.names.find(device) or node) != node

    said = named_subvolumes(WatchedReader(mounting.files), here or "", is_elsewhere)
    options = sorted(each for each in said if each)
    if not said - {""} or (here is None and "" in said):
        return None
    numbers, default = _list_subvolumes(mounting)
    found = {option: _number(option, numbers) for option in options}
    if (default if here is None else numbers.get(here)) in found.values():
        return None
    if len(said) > 1 or None in said:
        listed = printable(", ".join(options[:LISTED_LIMIT])) or "one known only at boot"
        raise SeveralOperatingSystemsError(
            f"the boot menus do not say which subvolume of {node} is the root: {listed}",
            hint=_HINT,
        )
    number = found[options[0]]
    paths = {each: path for path, each in numbers.items()}
    if number == default:
        return node
    if number is None or number not in paths:
        raise InspectionError(
            f"the boot menu makes a subvolume of {node} the root, {printable(options[0])}, "
            "which does not exist",
            hint=_HINT,
        )
    return name_subvolume(node, paths[number])


def _list_subvolumes(mounting: Mounting) -> tuple[dict[str, int], int]:
    """Return the subvolumes of the mounted root's filesystem with their numbers, and the default.

    Raises:
        InspectionError: a name cannot be read.
        ApplianceCallError: they cannot be listed.
    """
    try:
        found = mounting.appliance.call("btrfs_subvolume_list", "/")
    except UnicodeDecodeError as exc:
        raise InspectionError(
            f"the name of a subvolume of {mounting.root.device} is not valid UTF-8", hint=_HINT
        ) from exc
    numbers = {str(each["btrfssubvolume_path"]): int(each["btrfssubvolume_id"]) for each in found}
    default = mounting.appliance.call("btrfs_subvolume_get_default", "/")
    return {path: number for path, number in numbers.items() if "," not in path}, int(default)


def _number(option: str, numbers: dict[str, int]) -> int | None:
    """Return the number of the subvolume that a mount option names, or None if there is none."""
    name, _, value = option.partition("=")
    if name == "subvol":
        return numbers.get(value)
    return int(value) if int(value) in (TOP_LEVEL, *numbers.values()) else None
