"""Mount a guest whose disk structures show where everything is, without a search.

Such a disk has no table, a GPT or an MBR. Its partitions and logical volumes have ext2
to ext4, XFS or btrfs, swap, boot code, nothing, or filesystems that Linux does not boot
from. Only one of them may be a root of Linux. All other disks are left to the search in
``roots``, which also raises every refusal.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vmprovision.appliance.bootedsubvolume import mount_booted
from vmprovision.appliance.devicenames import DeviceNames
from vmprovision.appliance.mounting import (
    Mounting,
    is_usr,
    mount_device,
    mount_root,
    unix_root,
)
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.appliance.subvolumes import list_subvolumes, merge_btrfs
from vmprovision.disklayout.partitions import UnclearLayoutError
from vmprovision.disklayout.subvolumes import BTRFS, split_subvolume, subvolume_options
from vmprovision.errors import InspectionError
from vmprovision.filesystem.protocol import ROOT
from vmprovision.inspection.ostree import OF_A_BOOT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmprovision.appliance.firstbytes import Contents, Volume
    from vmprovision.appliance.mounting import MountedGuest, Root
    from vmprovision.appliance.session import Appliance

log = logging.getLogger(__name__)

# `recognise_system` knows no system without one of these names.
OF_A_ROOT = frozenset(("bin", "etc", "gnu", "hurd", "nix", "ostree", "sbin", "usr"))
OF_A_USR = frozenset(("share", "lib", "dev", "proc", "init"))  # further names that `is_usr` checks


def mount_plain_guest(
    appliance: Appliance, contents: Contents, *, readonly: bool
) -> MountedGuest | None:
    """Return the mounted guest, or None with nothing mounted if a search is needed.

    Args:
        appliance: has the disk.
        contents: the disk's content.
        readonly: mount without writing.
    """
    try:
        _require_known(contents.volumes.values())
        contents.start_volumes(appliance)
        device = _find_root(appliance, contents)
        return _mount(appliance, contents, device, readonly=readonly)
    except (UnclearLayoutError, ApplianceCallError, InspectionError) as exc:
        log.info("searching every filesystem: %s", exc)
    appliance.unmount()
    return None


def _require_known(volumes: Iterable[Volume]) -> None:
    """Raise an error if a volume's content is unknown."""
    for volume in volumes:
        if volume.superblock is None and not volume.is_nothing:
            raise UnclearLayoutError(f"{volume.device} holds no plain filesystem")


def _find_root(appliance: Appliance, contents: Contents) -> str:
    """Return the only device or subvolume that may hold a root of Linux.

    Raises:
        UnclearLayoutError: there is none, or there are several.
        ApplianceCallError: something cannot be mounted.
        InspectionError: likewise.
    """
    candidates = [volume for volume in contents.volumes.values() if volume.is_unix]
    if [volume.kind for volume in candidates] in (["ext"], ["xfs"]):
        return candidates[0].device
    found = []
    for volume in candidates:
        if may_hold_root(appliance, volume.device, volume.driver):
            found.append(volume.device)
        elif volume.kind == BTRFS:
            found += _subvolume_roots(appliance, volume)
    if len(found) != 1:
        raise UnclearLayoutError(f"{len(found)} filesystems may be the root")
    return found[0]


def _subvolume_roots(appliance: Appliance, volume: Volume) -> list[str]:
    """Return the subvolume with the root, for a btrfs whose default subvolume has none."""
    if not volume.driver:
        raise UnclearLayoutError(f"the btrfs on {volume.device} does not fill it")
    names = [
        name
        for name in list_subvolumes(appliance, volume.device)
        if may_hold_root(appliance, name, volume.driver)
    ]
    if len(names) < 2:  # noqa: PLR2004 -- there is nothing to choose
        return names
    roots = [_look_into(appliance, name, volume.driver) for name in names]
    return [root.device for root in merge_btrfs([root for root in roots if root])]


def _look_into(appliance: Appliance, device: str, driver: str) -> Root | None:
    """Return the root on a device; mount the device only for the duration of the call."""
    files = mount_root(appliance, device, readonly=True, driver=driver)
    try:
        return unix_root(files, device)
    finally:
        appliance.unmount()


def may_hold_root(appliance: Appliance, device: str, driver: str) -> bool:
    """Return whether a filesystem's root directory may be that of an operating system.

    The filesystem is mounted only for the duration of the call.

    Raises:
        ApplianceCallError: it cannot be mounted.
        InspectionError: it cannot be read.
    """
    names = None
    if driver:
        node, options = subvolume_options(device)
        names = appliance.look(node, driver, OF_A_ROOT | OF_A_USR | OF_A_BOOT, options)
    if names is None:
        files = mount_device(appliance, device, readonly=True, driver=driver)
        try:
            names = set(files.list_directory(ROOT))
        finally:
            appliance.unmount()
    is_boot = names >= OF_A_BOOT and not (OF_A_ROOT - OF_A_BOOT) & names
    return bool(OF_A_ROOT & names) and not is_usr(names) and not is_boot


def _mount(
    appliance: Appliance, contents: Contents, device: str, *, readonly: bool
) -> MountedGuest:
    """Mount a root and return the guest.

    Raises:
        UnclearLayoutError: the device has no root of Linux.
        ApplianceCallError: a device cannot be mounted or queried.
        InspectionError: likewise, or the files cannot be read.
    """
    driver = contents.driver(device)
    files = mount_root(appliance, device, readonly=readonly, driver=driver)
    root = unix_root(files, device)
    if root is None or root.system != "linux":
        raise UnclearLayoutError(f"{device} has no Linux")
    names = DeviceNames(list(contents.volumes), lambda *asked: contents.tag(appliance, *asked))
    mounting = Mounting(
        appliance=appliance,
        files=files,
        root=root,
        names=names,
        readonly=readonly,
        driver_of=contents.driver,
    )
    if contents.volumes[split_subvolume(device)[0]].kind == BTRFS:
        return mount_booted(mounting)
    return mounting.mount_wanted()
