"""The layers between disks and filesystems: arrays, encryption, logical volumes.

libguestfs lists the filesystems that it can mount. This module first opens the layers
below them, and names those that it cannot open: a locked LUKS volume, a pool of ZFS.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.arrays import MEMBER, Arrays, examine_arrays
from vmprovision.appliance.firstbytes import LVM, Contents, kind_of_device
from vmprovision.appliance.foreign import FOREIGN
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.appliance.subvolumes import list_subvolumes
from vmprovision.disklayout.subvolumes import BTRFS
from vmprovision.errors import ApplianceError, InspectionError, WrongKeyError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from vmprovision.appliance.session import Appliance
    from vmprovision.disklayout.keyfile import Key

log = logging.getLogger(__name__)

LUKS = "crypto_LUKS"  # blkid(8)'s name of versions 1 and 2
# cryptsetup(8)'s parameters for LUKS 2 on a large machine (four passes over 1 GB) take
# 45 s without KVM, for each key slot.
UNLOCK_SECONDS = 900.0
NO_PERMISSION = 2  # cryptsetup's exit code if the key opens no slot
KEY_PLACE = "/dev/shm/vmprovision-key"  # noqa: S108 -- in the appliance, without other users


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The devices on the disks, after every layer that can be opened was opened.

    Attributes:
        filesystems: device -> kind, as libguestfs lists them.
        others: device -> kind, for other content that blkid(8) knows.
        unlocked: encrypted device -> the device of its content.
        tried: locked devices for which the caller has given a key.
        array_names: the guest's name of an MD array -> the appliance's device.
        unusable: member of an MD array -> why the array must not be used.
        contents: the disks' content, if their own structures show all of it.
    """

    filesystems: Mapping[str, str]
    others: Mapping[str, str]
    unlocked: Mapping[str, str]
    tried: tuple[str, ...]
    array_names: Mapping[str, str]
    unusable: Mapping[str, str]
    contents: Contents | None = None

    def driver(self, device: str) -> str:
        """Return the kernel's filesystem on a device; empty if mount(8) must probe."""
        return self.contents.driver(device) if self.contents else ""

    @property
    def locked(self) -> list[str]:
        """The encrypted devices that no key opens."""
        return [
            device
            for device, kind in self.others.items()
            if kind == LUKS and device not in self.unlocked
        ]


def open_layers(appliance: Appliance, contents: Contents | None, keys: Sequence[Key]) -> Layers:
    """Start arrays and logical volumes and unlock encrypted volumes, layer by layer.

    Args:
        appliance: an appliance with the disks.
        contents: the disks' content, or None if their structures do not show all of it.
        keys: the caller's.

    Raises:
        WrongKeyError: a key for one volume does not open it.
        InspectionError: an encrypted volume cannot be read.
        ApplianceTimeoutError: deriving a key takes too long.
    """
    if contents is not None and (known := _known_layers(appliance, contents, keys)):
        return known
    arrays = Arrays(names={}, unusable={})
    appliance.activate_volumes()
    filesystems, others = _look(appliance)
    if MEMBER in others.values():
        arrays = _examined_arrays(appliance, others)
        filesystems, others = _look(appliance)
    unlocked: dict[str, str] = {}
    tried: list[str] = []
    while opened := _unlock_new(appliance, others, keys, (unlocked, tried)):
        unlocked.update(opened)
        appliance.call("lvm_scan", True)  # noqa: FBT003 -- libguestfs's: activate what is found
        filesystems, others = _look(appliance)
    if unlocked or MEMBER in others.values():
        appliance.before_detaching(lambda: close_layers(appliance, unlocked.values()))
    return Layers(
        filesystems=filesystems,
        others=others,
        unlocked=unlocked,
        tried=tuple(tried),
        array_names=arrays.names,
        unusable=arrays.unusable,
    )


def _known_layers(appliance: Appliance, contents: Contents, keys: Sequence[Key]) -> Layers | None:
    """Return the layers of disks whose content is known, or None if something must be started."""
    try:
        kinds = _known_kinds(appliance, contents)
    except ApplianceCallError as exc:
        log.info("libguestfs searches the disks, which takes longer: %s", exc.message)
        return None
    if MEMBER in kinds.values() or (keys and LUKS in kinds.values()):
        return None  # an array must be started, or a volume unlocked
    closed = {device: kind for device, kind in kinds.items() if kind in (LUKS, *FOREIGN)}
    return Layers(
        filesystems={device: kind for device, kind in kinds.items() if device not in closed},
        others=closed,
        unlocked={},
        tried=(),
        array_names={},
        unusable={},
        contents=contents,
    )


def _known_kinds(appliance: Appliance, contents: Contents) -> dict[str, str]:
    """Return blkid(8)'s name of the content of each device or subvolume.

    Raises:
        ApplianceCallError: logical volumes cannot be made, or subvolumes cannot be listed.
    """
    contents.start_volumes(appliance)
    kinds: dict[str, str] = {}
    for device, volume in contents.volumes.items():
        kinds[device] = volume.certain_kind or kind_of_device(appliance, device) or "unknown"
        if kinds[device] == BTRFS:
            kinds |= dict.fromkeys(list_subvolumes(appliance, device), BTRFS)
    return kinds


def _look(appliance: Appliance) -> tuple[dict[str, str], dict[str, str]]:
    """Return the kinds by device: filesystems as libguestfs lists them, and others."""
    try:
        listed = dict(appliance.call("list_filesystems"))
    except ApplianceCallError as exc:
        # it mounts a btrfs to list its subvolumes, and fails if that one is damaged
        log.info("looking at each device: %s", exc.message)
        listed = _listed_one_by_one(appliance)
    # libguestfs takes LVM's complaints for names of volumes
    filesystems = {device: kind for device, kind in listed.items() if " " not in device}
    return filesystems, dict(_others(appliance, filesystems))


def _listed_one_by_one(appliance: Appliance) -> dict[str, str]:
    """Return what ``list_filesystems`` does, without the subvolumes of a damaged btrfs."""
    closed = (MEMBER, LUKS, LVM, *FOREIGN)
    found = {device: kind for device, kind in _others(appliance, {}) if kind not in closed}
    for device in [device for device, kind in found.items() if kind == BTRFS]:
        with contextlib.suppress(ApplianceCallError):
            found |= dict.fromkeys(list_subvolumes(appliance, device), BTRFS)
    return found


def _examined_arrays(appliance: Appliance, others: Mapping[str, str]) -> Arrays:
    """Return the arrays; stop those that lack a member, and the logical volumes on them."""
    # an array cannot be stopped while a volume group on it is active
    appliance.call("vg_activate_all", False)  # noqa: FBT003 -- libguestfs's
    arrays = examine_arrays(appliance, [d for d, kind in others.items() if kind == MEMBER])
    appliance.call("lvm_scan", True)  # noqa: FBT003 -- libguestfs's: activate what is found
    return arrays


def _unlock_new(
    appliance: Appliance,
    others: Mapping[str, str],
    keys: Sequence[Key],
    known: tuple[dict[str, str], list[str]],
) -> dict[str, str]:
    """Unlock the encrypted devices that have appeared; return their content's devices.

    Args:
        appliance: an appliance with the devices.
        others: device -> kind.
        keys: the caller's.
        known: the devices that are unlocked or that no key opens; new ones are added.
    """
    unlocked, tried = known
    opened = {}
    for device, kind in others.items():
        if kind != LUKS or device in unlocked or device in tried:
            continue
        mapped, has_key = _unlock(appliance, device, keys)
        if mapped:
            opened[device] = mapped
        elif has_key:
            tried.append(device)
    return opened


def close_layers(appliance: Appliance, mapped: Collection[str]) -> None:
    """Stop everything that ``open_layers`` started; nothing on it is still mounted.

    An array that is not stopped counts as unclean, and the guest would resynchronise it.

    Raises:
        ApplianceError: something is still in use.
    """
    # a volume group may be on an encrypted volume, or the reverse
    for _ in range(len(mapped) + 1):
        groups_stopped = _works(appliance, "vg_activate_all", activate=False)
        mapped = [d for d in mapped if not _works(appliance, "cryptsetup_close", device=d)]
        if groups_stopped and not mapped:
            break
    else:
        raise ApplianceError(f"a volume group or {', '.join(mapped)} cannot be stopped")
    for array in appliance.call("list_md_devices"):
        appliance.call("md_stop", array)


def _works(appliance: Appliance, name: str, **arguments: Any) -> bool:  # noqa: ANN401 -- as call
    """Return whether a call succeeds; a failed one may succeed after another call."""
    try:
        appliance.call(name, **arguments)
    except ApplianceCallError as exc:
        log.info("%s: %s", name, exc.message)
        return False
    return True


def _others(appliance: Appliance, filesystems: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Return other devices, with the kinds that blkid(8) knows."""
    partitions = appliance.call("list_partitions")
    partitioned = {appliance.call("part_to_dev", partition) for partition in partitions}
    devices = [
        *(device for device in appliance.call("list_devices") if device not in partitioned),
        *partitions,
        *appliance.call("list_md_devices"),
        *appliance.call("list_dm_devices"),
        *appliance.call("lvs"),
    ]
    for device in devices:
        if device not in filesystems and (kind := kind_of_device(appliance, device)):
            yield device, kind


def _unlock(appliance: Appliance, device: str, keys: Sequence[Key]) -> tuple[str | None, bool]:
    """Return the device of the content if a key opens the volume, and whether a key was tried."""
    try:
        uuid = str(appliance.call("luks_uuid", device)).lower()
    except ApplianceCallError as exc:
        log.info("%s has no header that can be read: %s", device, exc.message)
        return None, False
    fitting = [key for key in keys if key.fits(device, uuid, _mapper_name(device))]
    name = f"luks-{uuid}"
    for key in fitting:
        if any(
            _opens(appliance, device, name, passphrase, key) for passphrase in key.passphrases()
        ):
            return f"/dev/mapper/{name}", True
    for key in fitting:
        if key.is_for_one:
            raise WrongKeyError(
                f"the key in {key.file.path} does not open {device}",
                hint="check the key with `cryptsetup open --test-passphrase --key-file`",
            )
    return None, bool(fitting)


def _mapper_name(device: str) -> str:
    """Return device-mapper's name of the logical volume ``/dev/VG/LV``."""
    parts = device.removeprefix("/dev/").split("/")
    return "/dev/mapper/" + "-".join(part.replace("-", "--") for part in parts)


def _opens(appliance: Appliance, device: str, name: str, passphrase: bytes, key: Key) -> bool:
    """Return whether the passphrase opens the volume; it is then mapped by this name.

    libguestfs's ``cryptsetup_open`` is not used. It takes no NUL, understands prefixes only
    in some versions, and writes the key to a file on the appliance's disk, which is a file
    of the host.

    Raises:
        InspectionError: cryptsetup(8) fails for another reason.
    """
    _upload(appliance, passphrase)
    command = shlex.join(
        ["cryptsetup", "open", "--type", "luks", "--key-file", KEY_PLACE, device, name]
    )
    said = appliance.call(
        "debug", "sh", [f"{command}; echo $?; rm {KEY_PLACE}"], limit=UNLOCK_SECONDS
    )
    *words, code = str(said).split() or ["0"]
    if code == "0":
        return True
    if code != str(NO_PERMISSION):
        raise InspectionError(
            f"{device} cannot be unlocked: {' '.join(words)[-300:] or f'exit code {code}'}",
            hint="check whether cryptsetup(8) on the host opens it",
        )
    log.info("%s cannot be opened with the key in %s", device, key.file.path)
    return False


def _upload(appliance: Appliance, passphrase: bytes) -> None:
    """Write a passphrase into the appliance's memory."""
    with open(os.memfd_create("vmprovision"), "wb") as file:  # noqa: PTH123 -- an open file
        file.write(passphrase)
        file.flush()
        appliance.call("debug_upload", f"/proc/self/fd/{file.fileno()}", KEY_PLACE, 0o600)
