"""Find the operating systems on the drives of an appliance, and mount the one to work on.

libguestfs's own ``inspect_os`` is not used: it takes most of its time for facts
that we do not need, and it finds nothing where ``/etc`` or ``/bin`` is an
absolute link, or where only ``/usr/lib/os-release`` is there.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from vmprovision.appliance.filesystem import ApplianceFilesystem
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.errors import (
    InspectionError,
    NoOperatingSystemError,
    SeveralOperatingSystemsError,
    UnsupportedGuestError,
)
from vmprovision.filesystem import read_text, resolve, status_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmprovision.appliance.session import Appliance
    from vmprovision.filesystem import GuestReader

log = logging.getLogger(__name__)

OperatingSystem = Literal["linux", "windows", "bsd", "hurd"]

# Filesystems that hold no tree of files, or none that Linux boots from.
SKIPPED = ("swap", "unknown", "LVM2_member", "linux_raid_member", "zfs_member")
ENCRYPTED = ("crypto_LUKS", "BitLocker")
# Where a program of the guest may look for a part of what is injected, or where
# its boot loader keeps the kernel's command line.
MOUNTED = tuple(
    PurePosixPath(path)
    for path in ("/usr", "/usr/local", "/etc", "/var", "/var/log", "/opt", "/boot", "/boot/efi")
)
MBR_BSD = (0xA5, 0xA6, 0xA9)  # FreeBSD, OpenBSD, NetBSD
BTRFS_PREFIX = "btrfsvol:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A filesystem that holds an operating system.

    Attributes:
        device: as libguestfs names it (``/dev/sda1``, ``btrfsvol:/dev/sda2/@``).
        system: what kind of operating system it is.
        name: what its release file calls it, or its kind.
        subvolume: the btrfs subvolume that its own fstab mounts at ``/``, if it names one.
    """

    device: str
    system: OperatingSystem
    name: str
    subvolume: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MountedGuest:
    """The guest as it is mounted in the appliance at ``/``.

    Attributes:
        root: the chosen root.
        mountpoints: guest directory -> device, for the root and what its fstab adds.
        notes: what fstab names and the image does not hold.
    """

    filesystem: ApplianceFilesystem
    root: Root
    mountpoints: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())


def mount_guest(appliance: Appliance, *, wanted: str | None, readonly: bool) -> MountedGuest:
    """The image's Linux guest, mounted at the appliance's guest root.

    Args:
        appliance: holds the image as its drive.
        wanted: the device of the root to use where there are several.
        readonly: mount without writing.

    Raises:
        NoOperatingSystemError: nothing here boots.
        SeveralOperatingSystemsError: more than one root and none wanted.
        UnsupportedGuestError: Windows, BSD, Hurd, encrypted or hibernated.
    """
    filesystems: dict[str, str] = appliance.call("list_filesystems")
    roots = [root for device in filesystems if (root := _root_on(appliance, device, filesystems))]
    root = _choose(appliance, _merge_btrfs(roots), filesystems, wanted)
    if any(kind == "swsuspend" for kind in filesystems.values()):
        raise UnsupportedGuestError(
            f"the guest {root.name} is hibernated: it holds its filesystems in memory",
            hint="start it, shut it down, and inject then",
        )
    _mount(appliance, root.device, "/", readonly=readonly)
    reader = ApplianceFilesystem(appliance)
    mountpoints = {"/": root.device}
    notes = []
    for device, mountpoint, options in _wanted_mounts(reader):
        found = _find_device(appliance, device, filesystems)
        if found is None:
            notes.append(
                f"/etc/fstab mounts {device} on {mountpoint}; the image has no such device"
            )
        elif _mount_extra(appliance, found, mountpoint, options, readonly=readonly):
            mountpoints[str(mountpoint)] = found
        else:
            notes.append(f"{found} cannot be mounted on {mountpoint}")
    return MountedGuest(filesystem=reader, root=root, mountpoints=mountpoints, notes=tuple(notes))


_FSTAB = PurePosixPath("/etc/fstab")


def _root_on(appliance: Appliance, device: str, filesystems: Mapping[str, str]) -> Root | None:
    kind = filesystems[device]
    if kind in SKIPPED or kind in ENCRYPTED or kind == "swsuspend":
        return None
    if kind == "ufs":
        return Root(device=device, system="bsd", name="BSD")
    try:
        appliance.call("mount_ro", device, "/")
    except ApplianceCallError as exc:
        log.info("cannot mount %s (%s): %s", device, kind, exc.message)
        return None
    try:
        reader = ApplianceFilesystem(appliance)
        if kind in ("ntfs", "vfat", "exfat"):
            return _windows_root(reader, device)
        return _unix_root(reader, device)
    except InspectionError as exc:
        log.info("cannot read %s: %s", device, exc.message)
        return None
    finally:
        appliance.call("umount_all")


def _unix_root(reader: GuestReader, device: str) -> Root | None:
    system = recognise_system(reader)
    if system is None:
        return None
    return Root(device=device, system=system, name=_name(reader), subvolume=_own_subvolume(reader))


def _windows_root(reader: GuestReader, device: str) -> Root | None:
    names = [name for name in reader.list_directory(PurePosixPath("/")) if _is_windows(name)]
    for name in names:
        inside = {entry.lower() for entry in reader.list_directory(PurePosixPath("/") / name)}
        if inside & {"system32", "system"}:
            return Root(device=device, system="windows", name="Windows")
    return None


def _is_windows(name: str) -> bool:
    return name.lower() in ("windows", "winnt")


def recognise_system(reader: GuestReader) -> OperatingSystem | None:
    """What kind of operating system has its root in this filesystem, if any has.

    A root may be no more than ``/etc`` with links that lead to a ``/usr`` on
    another filesystem, so release files are enough, and so is a program that
    the kernel would start.
    """
    there = [name for name in reader.list_directory(PurePosixPath("/")) if name != "lost+found"]
    if not there or _is_usr(there):
        return None
    if "hurd" in there and _exists(reader, "/hurd/init"):
        return "hurd"
    if _exists(reader, "/bin/freebsd-version") or _exists(reader, "/etc/rc.subr"):
        return "bsd"
    etc = reader.list_directory(PurePosixPath("/etc"))
    released = any(_RELEASE.match(name) for name in etc) or _exists(reader, "/usr/lib/os-release")
    starts = any(_stands(reader, path) for path in ("/sbin/init", "/etc/init", "/bin/init"))
    shell = _stands(reader, "/bin/sh") and bool(etc)
    special = _exists(reader, "/nix/store") or _exists(reader, "/ostree/deploy")
    special = special or _exists(reader, "/gnu/store")
    return "linux" if released or starts or shell or special else None


def _is_usr(names: Sequence[str]) -> bool:
    """Whether this is a ``/usr`` of its own: its bin, sbin and lib look like a root's."""
    return "usr" not in names and "share" in names


_RELEASE = re.compile(r"(?:.+-release|.+_version|os-release|openwrt_release)$")


def _exists(reader: GuestReader, path: str) -> bool:
    return status_of(reader, PurePosixPath(path)) is not None


def _stands(reader: GuestReader, path: str) -> bool:
    """Whether anything has this name, a link that leads to another filesystem included."""
    return reader.lstat(PurePosixPath(path)) is not None or _exists(reader, path)


def _name(reader: GuestReader) -> str:
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        text = read_text(reader, PurePosixPath(path)) or ""
        if match := re.search(r'^PRETTY_NAME=["\']?([^"\'\n]{1,80})', text, re.MULTILINE):
            return match[1]
    return "Linux"


def _own_subvolume(reader: GuestReader) -> str | None:
    """The subvolume that a root's own fstab mounts at ``/``; its snapshots say the same."""
    for _, mountpoint, options in _fstab_entries(reader):
        if mountpoint == PurePosixPath("/"):
            named = dict(option.partition("=")[::2] for option in options)
            return named.get("subvol", "").strip("/") or None
    return None


def _fstab_entries(reader: GuestReader) -> list[tuple[str, PurePosixPath, list[str]]]:
    """Device, mountpoint and options of each line of the guest's fstab(5) that mounts something."""
    entries = []
    for line in (read_text(reader, _FSTAB) or "").splitlines():
        fields = line.split()
        if line.lstrip().startswith("#") or len(fields) < 2 or fields[1][0] != "/":  # noqa: PLR2004
            continue
        options = fields[3].split(",") if len(fields) > 3 else []  # noqa: PLR2004
        entries.append((fields[0].strip('"'), PurePosixPath(fields[1]), options))
    return entries


def _merge_btrfs(roots: Sequence[Root]) -> list[Root]:
    """The roots with btrfs's snapshots of the same system left out.

    ``list_filesystems`` names the default subvolume by its plain device, so where
    the plain device is a root, that is the one that boots; else the one that the
    system's own fstab names, whatever older roots and snapshots are beside it.
    """
    kept: dict[str, Root] = {}
    for root in roots:
        device, subvolume = _split_btrfs(root.device)
        other = kept.get(device)
        if other is not None:
            log.info("%s and %s are subvolumes of one filesystem", root.device, other.device)
        named = subvolume is not None and subvolume == root.subvolume
        if other is None or subvolume is None or (named and other.device != device):
            kept[device] = root
    return list(kept.values())


def _split_btrfs(device: str) -> tuple[str, str | None]:
    """``btrfsvol:/dev/sda2/@`` as ``/dev/sda2`` and ``@``; the subvolume None for other devices.

    A logical volume's device has a directory more: ``/dev/VG/LV``.
    """
    if not device.startswith(BTRFS_PREFIX):
        return device, None
    parts = PurePosixPath(device.removeprefix(BTRFS_PREFIX)).parts
    length = 3 if re.fullmatch(r"[shv]d[a-z]+\d*|md\d+", parts[2]) else 4
    return str(PurePosixPath(*parts[:length])), "/".join(parts[length:])


def _choose(
    appliance: Appliance,
    roots: Sequence[Root],
    filesystems: Mapping[str, str],
    wanted: str | None,
) -> Root:
    if wanted is not None:
        for root in roots:
            if root.device == wanted:
                return _linux(root)
        known = ", ".join(root.device for root in roots) or "none"
        raise NoOperatingSystemError(
            f"there is no operating system on {wanted}", hint=f"roots found: {known}"
        )
    systems = [root for root in roots if root.system == "linux"] or list(roots)
    if len(systems) == 1:
        return _linux(systems[0])
    if systems:
        listed = ", ".join(f"{root.device} ({root.name})" for root in systems)
        raise SeveralOperatingSystemsError(
            f"the image holds {len(systems)} operating systems: {listed}",
            hint="choose one with --root DEVICE",
        )
    if encrypted := _encrypted_device(appliance):
        raise UnsupportedGuestError(
            f"{encrypted} is encrypted and no other filesystem holds an operating system",
            hint="inject before the disk is encrypted",
        )
    if _has_bsd_partition(appliance):
        raise UnsupportedGuestError(
            "the image holds a BSD system", hint="only Linux guests can be injected into"
        )
    seen = ", ".join(f"{device} ({kind})" for device, kind in filesystems.items()) or "none"
    raise NoOperatingSystemError(
        "no filesystem of the image holds an operating system", hint=f"filesystems seen: {seen}"
    )


def _encrypted_device(appliance: Appliance) -> str | None:
    """The first encrypted device; ``list_filesystems`` leaves them out."""
    devices = (*appliance.call("list_partitions"), *appliance.call("list_devices"))
    return next((device for device in devices if _kind(appliance, device) in ENCRYPTED), None)


def _kind(appliance: Appliance, device: str) -> str:
    try:
        return str(appliance.call("vfs_type", device))
    except ApplianceCallError:  # nothing that blkid(8) knows
        return ""


def _linux(root: Root) -> Root:
    if root.system == "linux":
        return root
    names = {"windows": "Windows", "bsd": "a BSD system", "hurd": "GNU/Hurd"}
    raise UnsupportedGuestError(
        f"{root.device} holds {names[root.system]}", hint="only Linux guests can be injected into"
    )


def _has_bsd_partition(appliance: Appliance) -> bool:
    for partition in appliance.call("list_partitions"):
        disk = appliance.call("part_to_dev", partition)
        number = appliance.call("part_to_partnum", partition)
        try:
            if appliance.call("part_get_parttype", disk) == "msdos":
                if appliance.call("part_get_mbr_id", disk, number) in MBR_BSD:
                    return True
            elif str(appliance.call("part_get_gpt_type", disk, number)).startswith("516E7C"):
                return True  # the FreeBSD family of GPT types
        except ApplianceCallError:
            continue
    return False


def _mount(appliance: Appliance, device: str, mountpoint: str, *, readonly: bool) -> None:
    try:
        appliance.call("mount_ro" if readonly else "mount", device, mountpoint)
    except ApplianceCallError as exc:
        raise InspectionError(
            f"{device} cannot be mounted on {mountpoint}: {exc.message}",
            hint="check the guest's filesystem with fsck",
        ) from exc


def _mount_extra(
    appliance: Appliance,
    device: str,
    mountpoint: PurePosixPath,
    options: Sequence[str],
    *,
    readonly: bool,
) -> bool:
    """Mount one more filesystem of the guest; False where that cannot be done.

    mount(8) runs in the appliance, not inside the guest's root: through a link
    of the guest it would mount over the appliance's own directories, and the
    guest's programs would run in their place.  So only a real directory will do.
    """
    try:
        real = resolve(ApplianceFilesystem(appliance), mountpoint)
        status = ApplianceFilesystem(appliance).lstat(real)
        if status is None or status.kind != "directory":
            return False
        kept = [option for option in options if option.startswith("subvol")]
        flags = ",".join(["ro" if readonly else "rw", *kept])
        appliance.call("mount_options", flags, device, str(real))
    except (ApplianceCallError, InspectionError) as exc:
        log.info("cannot mount %s on %s: %s", device, mountpoint, exc.message)
        return False
    return True


def _wanted_mounts(reader: GuestReader) -> list[tuple[str, PurePosixPath, list[str]]]:
    """Those of the guest's fstab that matter, parents first."""
    wanted = [
        (device, mountpoint, options)
        for device, mountpoint, options in _fstab_entries(reader)
        if mountpoint in MOUNTED
        and device not in ("tmpfs", "overlay", "none")
        and not {"bind", "rbind"} & set(options)
    ]
    return sorted(wanted, key=lambda entry: len(entry[1].parts))


def _find_device(appliance: Appliance, name: str, filesystems: Mapping[str, str]) -> str | None:
    """The appliance's device for what fstab calls it: UUID=, LABEL=, a path of another kernel."""
    for prefix, directory in (
        ("UUID=", "/dev/disk/by-uuid/"),
        ("LABEL=", "/dev/disk/by-label/"),
        ("PARTUUID=", "/dev/disk/by-partuuid/"),
        ("PARTLABEL=", "/dev/disk/by-partlabel/"),
    ):
        for start in (prefix, directory):
            if name.startswith(start):
                value = name.removeprefix(start).strip("\"'")
                return _find_by(appliance, prefix.rstrip("="), value, filesystems)
    if name in filesystems:
        return name
    if name.startswith("/dev/mapper/"):
        return _find_mapped(name.removeprefix("/dev/mapper/"), filesystems)
    if match := re.fullmatch(r"/dev/(?:[shv]d|xvd)a(\d+)", name):
        return _known(f"/dev/sda{match[1]}", filesystems)
    if match := re.fullmatch(r"/dev/(?:nvme0n1|mmcblk0)p(\d+)", name):
        return _known(f"/dev/sda{match[1]}", filesystems)
    return None


def _known(device: str, filesystems: Mapping[str, str]) -> str | None:
    return device if device in filesystems else None


def _find_mapped(name: str, filesystems: Mapping[str, str]) -> str | None:
    """The logical volume that device-mapper calls ``vg-lv``, hyphens inside doubled."""
    parts = [part.replace("\0", "-") for part in name.replace("--", "\0").split("-")]
    return _known("/dev/" + "/".join(parts), filesystems)


def _find_by(
    appliance: Appliance, key: str, value: str, filesystems: Mapping[str, str]
) -> str | None:
    tag = {"PARTUUID": "PART_ENTRY_UUID", "PARTLABEL": "PART_ENTRY_NAME"}.get(key, key)
    for device in filesystems:
        if device.startswith(BTRFS_PREFIX):
            continue
        try:
            tags = appliance.call("blkid", device)
        except ApplianceCallError:
            continue
        if str(tags.get(tag, "")).lower() == value.lower():
            return device
    return None
