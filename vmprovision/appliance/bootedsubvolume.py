"""Mount the subvolume of btrfs that the guest's boot menu makes the root.

The kernel's option ``rootflags=`` names it (see ``rootoptions``). Without one, the
filesystem's default subvolume boots. What fstab says of ``/`` comes too late to change it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from vmprovision.appliance.mounting import mount_root, unix_root
from vmprovision.appliance.snapshots import TOP_LEVEL, enter_snapshot, list_mounted_subvolumes
from vmprovision.disklayout.subvolumes import name_subvolume, split_subvolume
from vmprovision.errors import InspectionError, SeveralOperatingSystemsError, printable
from vmprovision.inspection.bootmenu import named_subvolumes
from vmprovision.inspection.watched import WatchedReader

if TYPE_CHECKING:
    from vmprovision.appliance.mounting import MountedGuest, Mounting

log = logging.getLogger(__name__)

LISTED_LIMIT = 5
_HINT = "choose the root with --root DEVICE, as btrfsvol:/dev/sda2/@"


def mount_booted(mounting: Mounting, *, is_chosen: bool = False) -> MountedGuest:
    """Mount a guest whose root is mounted, or, if its menu names one, another subvolume of it.

    If that subvolume is a read-only snapshot and the guest is to be written to, a new
    snapshot is mounted in its place.

    Args:
        mounting: the guest, whose root is on btrfs.
        is_chosen: the caller has chosen the root, whatever boots.

    Raises:
        InspectionError: the menu names a subvolume that does not exist or holds no Linux.
        SeveralOperatingSystemsError: the menus name several, and not the mounted one.
        UnsupportedGuestError: the root is a snapshot that cannot be written to.
        ApplianceCallError: it cannot be mounted.
    """
    guest = mounting.mount_wanted()
    said = _named_options(mounting)
    named = None if is_chosen else _named_root(mounting, said)
    if named is not None:
        first = mounting.root.device
        log.info("the boot menu makes %s the root instead of %s", named, first)
        mounting = _mount_instead(mounting, named)
        guest = mounting.mount_wanted()
        said = _named_options(mounting)
        if (other := _named_root(mounting, said)) is not None:
            raise SeveralOperatingSystemsError(
                f"the boot menu seen from {first} makes {named} the root, "
                f"and the one seen from there makes it {other}",
                hint=_HINT,
            )
    return enter_snapshot(mounting, guest, is_named=bool(said - {""}))


def _mount_instead(mounting: Mounting, device: str) -> Mounting:
    """Mount another root of the same filesystem.

    Raises:
        InspectionError: no Linux is there.
    """
    mounting.appliance.unmount()
    driver = mounting.driver_of(device)
    files = mount_root(mounting.appliance, device, readonly=mounting.readonly, driver=driver)
    root = unix_root(files, device)
    if root is None or root.system != "linux":
        raise InspectionError(
            f"the boot menu makes {device} the root, and no Linux is there", hint=_HINT
        )
    return replace(mounting, files=files, root=root, mountpoints={}, done={})


def _named_options(mounting: Mounting) -> set[str | None]:
    """Return the options by which the menus, as seen from a mounted root, name a subvolume."""
    node, here = split_subvolume(mounting.root.device)

    def is_elsewhere(device: str) -> bool:
        return (mounting.names.find(device) or node) != node

    return named_subvolumes(WatchedReader(mounting.files), here or "", is_elsewhere)


def _named_root(mounting: Mounting, said: set[str | None]) -> str | None:
    """Return the subvolume that boots instead of the mounted one, or None if there is none.

    Args:
        mounting: the guest, which is mounted.
        said: the options by which the menus name a subvolume.

    Raises:
        InspectionError: the named one does not exist.
        SeveralOperatingSystemsError: the menus name several.
    """
    node, here = split_subvolume(mounting.root.device)
    options = sorted(each for each in said if each)
    if not said - {""} or (here is None and "" in said):
        return None
    known = list_mounted_subvolumes(mounting.appliance, here)
    found = {option: _number(option, known.numbers) for option in options}
    if (known.default if here is None else known.numbers.get(here)) in found.values():
        return None
    if len(said) > 1 or None in said:
        listed = printable(", ".join(options[:LISTED_LIMIT])) or "one known only at boot"
        raise SeveralOperatingSystemsError(
            f"the boot menus do not say which subvolume of {node} is the root: {listed}",
            hint=_HINT,
        )
    number = found[options[0]]
    paths = {each: path for path, each in known.numbers.items()}
    if number == known.default:
        return node
    if number is None or number not in paths:
        raise InspectionError(
            f"the boot menu makes a subvolume of {node} the root, {printable(options[0])}, "
            "which does not exist",
            hint=_HINT,
        )
    return name_subvolume(node, paths[number])


def _number(option: str, numbers: dict[str, int]) -> int | None:
    """Return the number of the subvolume that a mount option names, or None if there is none."""
    name, _, value = option.partition("=")
    if name == "subvol":
        return numbers.get(value)
    return int(value) if int(value) in (TOP_LEVEL, *numbers.values()) else None
