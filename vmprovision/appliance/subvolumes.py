"""The subvolumes of a btrfs, as the kernel lists them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vmprovision.appliance.session import ApplianceCallError
from vmprovision.disklayout.subvolumes import BTRFS, name_subvolume, split_subvolume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmprovision.appliance.mounting import Root
    from vmprovision.appliance.session import Appliance

log = logging.getLogger(__name__)


def list_subvolumes(appliance: Appliance, device: str) -> list[str]:
    """Return the names of a btrfs's subvolumes, in the order of their numbers.

    The filesystem is mounted only for the duration of the call.

    Raises:
        ApplianceCallError: it cannot be mounted or read.
    """
    # from the default subvolume, the names of those inside it would be relative
    appliance.mount(device, BTRFS, "/", readonly=True, options="subvolid=5")
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

    The plain device is the default subvolume. If it is a root, it boots, unless a boot menu
    names another one. Otherwise the one boots that its own boot menu or fstab names, even if
    older roots and snapshots are beside it. Several that name themselves all stay.
    """
    kept: dict[str, list[Root]] = {}
    for root in roots:
        device = split_subvolume(root.device)[0]
        kept.setdefault(device, []).append(root)
    return [root for device, found in kept.items() for root in _boots(device, found)]


def _boots(device: str, roots: Sequence[Root]) -> Sequence[Root]:
    """Return the roots of one filesystem that may boot."""
    if len(roots) > 1:
        listed = ", ".join(root.device for root in roots)
        log.info("these are subvolumes of one filesystem: %s", listed)
    default = [root for root in roots if root.device == device]
    named = [root for root in roots if root.subvolume == split_subvolume(root.device)[1]]
    return default or named or roots[:1]
