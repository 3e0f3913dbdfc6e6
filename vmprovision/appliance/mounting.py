"""What makes a filesystem an operating system's root, and what its fstab mounts on it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from vmprovision.appliance.filesystem import ApplianceFilesystem
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.errors import InspectionError
from vmprovision.filesystem import read_text, resolve, status_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmprovision.appliance.session import Appliance
    from vmprovision.filesystem import GuestReader

log = logging.getLogger(__name__)

OperatingSystem = Literal["linux", "windows", "bsd", "hurd"]
TagOf = Callable[[str, str], str]  # device, tag as blkid(8) names it -> its value, or nothing

# Where a program of the guest may look for a part of what is injected, or where
# its boot loader keeps the kernel's command line.
MOUNTED = tuple(
    PurePosixPath(path)
    for path in ("/usr", "/usr/local", "/etc", "/var", "/var/log", "/opt", "/boot", "/boot/efi")
)
_FSTAB = PurePosixPath("/etc/fstab")
_CRYPTTAB = PurePosixPath("/etc/crypttab")


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


def unix_root(reader: GuestReader, device: str) -> Root | None:
    """The root that is on a device whose files are read here, if it is one."""
    system = recognise_system(reader)
    if system is None:
        return None
    return Root(device=device, system=system, name=_name(reader), subvolume=_own_subvolume(reader))


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


def mount_root(
    appliance: Appliance, device: str, *, readonly: bool, driver: str = ""
) -> ApplianceFilesystem:
    """The files of a root that is mounted now.

    Args:
        appliance: has the device.
        device: what is mounted.
        readonly: mount without writing.
        driver: the kernel's filesystem; without it mount(8) looks for all that it knows.

    Raises:
        InspectionError: it cannot be mounted.
    """
    try:
        if driver:
            appliance.mount(device, driver, "/", readonly=readonly)
        else:
            appliance.call("mount_options", _access(readonly=readonly), device, "/")
    except ApplianceCallError as exc:
        raise InspectionError(
            f"{device} cannot be mounted on /: {exc.message}",
            hint="check the guest's filesystem with fsck",
        ) from exc
    return ApplianceFilesystem(appliance)


def _access(*, readonly: bool) -> str:
    """How to mount: reading a guest's files leaves no times behind."""
    return "ro,noatime" if readonly else "rw,noatime"


def blkid_tag(appliance: Appliance, device: str, tag: str) -> str:
    """What blkid(8) says of a device, which takes a process of the appliance."""
    try:
        return str(appliance.call("blkid", device).get(tag, ""))
    except (ApplianceCallError, UnicodeDecodeError):  # nothing that it knows, or no text
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedMount:
    """A line of the guest's fstab that matters here.

    Attributes:
        named: the device, as fstab calls it.
        device: what the appliance calls it; None where the image does not hold it.
        driver: the kernel's filesystem; without it mount(8) looks for all that it knows.
    """

    named: str
    device: str | None
    mountpoint: PurePosixPath
    options: Sequence[str]
    driver: str = ""


def wanted_mounts(
    reader: GuestReader,
    devices: Collection[str],
    tag_of: TagOf,
    *,
    unlocked: Mapping[str, str] = MappingProxyType({}),
    names: Mapping[str, str] = MappingProxyType({}),
) -> list[WantedMount]:
    """Those lines of the guest's fstab(5) that matter, parents first.

    Args:
        reader: the root's files.
        devices: of the image, as the appliance calls them.
        tag_of: what blkid(8) says of one of them.
        unlocked: encrypted device -> the device of what is in it.
        names: what the guest calls other devices -> what the appliance does.
    """
    if unlocked:
        names = {**names, **crypttab_names(reader, unlocked, tag_of, names)}
    wanted = [
        WantedMount(
            named=named,
            device=names.get(named) or _find_device(named, devices, tag_of),
            mountpoint=mountpoint,
            options=options,
        )
        for named, mountpoint, options in _fstab_entries(reader)
        if mountpoint in MOUNTED
        and named not in ("tmpfs", "overlay", "none")
        and not {"bind", "rbind"} & set(options)
    ]
    return sorted(wanted, key=lambda entry: len(entry.mountpoint.parts))


def crypttab_names(
    reader: GuestReader,
    unlocked: Mapping[str, str],
    tag_of: TagOf,
    names: Mapping[str, str],
) -> dict[str, str]:
    """What the guest's crypttab(5) calls the unlocked volumes -> the appliance's device."""
    mapped = {}
    for line in (read_text(reader, _CRYPTTAB) or "").splitlines():
        fields = line.split()
        if line.lstrip().startswith("#") or len(fields) < 2:  # noqa: PLR2004
            continue
        encrypted = names.get(fields[1]) or _find_device(fields[1], unlocked, tag_of)
        if encrypted is not None and encrypted in unlocked:
            for directory in ("/dev/mapper/", "/dev/disk/by-id/dm-name-"):
                mapped[directory + fields[0]] = unlocked[encrypted]
    return mapped


def mount_wanted(
    appliance: Appliance,
    files: ApplianceFilesystem,
    root: Root,
    wanted: Iterable[WantedMount],
    *,
    readonly: bool,
) -> MountedGuest:
    """The guest whose root is mounted, with what its fstab adds mounted too where that works."""
    mountpoints = {"/": root.device}
    notes = []
    for entry in wanted:
        if entry.device is None:
            notes.append(
                f"/etc/fstab mounts {entry.named} on {entry.mountpoint}; "
                "the image has no such device"
            )
        elif _mount_extra(appliance, files, entry, entry.device, readonly=readonly):
            mountpoints[str(entry.mountpoint)] = entry.device
        else:
            notes.append(f"{entry.device} cannot be mounted on {entry.mountpoint}")
    return MountedGuest(filesystem=files, root=root, mountpoints=mountpoints, notes=tuple(notes))


def _mount_extra(
    appliance: Appliance,
    files: ApplianceFilesystem,
    entry: WantedMount,
    device: str,
    *,
    readonly: bool,
) -> bool:
    """Mount one more filesystem of the guest; False where that cannot be done.

    Mounting is done in the appliance, not inside the guest's root: through a link
    of the guest it would mount over the appliance's own directories, and the
    guest's programs would run in their place.  So only a real directory will do.
    """
    try:
        real = resolve(files, entry.mountpoint)
        status = files.lstat(real)
        if status is None or status.kind != "directory":
            return False
        if entry.driver:
            appliance.mount(device, entry.driver, str(real), readonly=readonly)
        else:
            kept = [option for option in entry.options if option.startswith("subvol")]
            flags = ",".join([_access(readonly=readonly), *kept])
            appliance.call("mount_options", flags, device, str(real))
    except (ApplianceCallError, InspectionError) as exc:
        log.info("cannot mount %s on %s: %s", device, entry.mountpoint, exc.message)
        return False
    files.mounted_on(real)
    return True


def _find_device(name: str, devices: Collection[str], tag_of: TagOf) -> str | None:
    """The appliance's device for what fstab calls it: UUID=, LABEL=, a path of another kernel."""
    for prefix, directory, tag in (
        ("UUID=", "/dev/disk/by-uuid/", "UUID"),
        ("LABEL=", "/dev/disk/by-label/", "LABEL"),
        ("PARTUUID=", "/dev/disk/by-partuuid/", "PART_ENTRY_UUID"),
        ("PARTLABEL=", "/dev/disk/by-partlabel/", "PART_ENTRY_NAME"),
    ):
        for start in (prefix, directory):
            if name.startswith(start):
                value = name.removeprefix(start).strip("\"'").lower()
                return next((d for d in devices if tag_of(d, tag).lower() == value), None)
    if name in devices:
        return name
    if name.startswith("/dev/mapper/"):
        return _find_mapped(name.removeprefix("/dev/mapper/"), devices)
    if match := re.fullmatch(r"/dev/(?:[shv]d|xvd)a(\d+)", name):
        return _known(f"/dev/sda{match[1]}", devices)
    if match := re.fullmatch(r"/dev/(?:nvme0n1|mmcblk0)p(\d+)", name):
        return _known(f"/dev/sda{match[1]}", devices)
    return None


def _known(device: str, devices: Collection[str]) -> str | None:
    return device if device in devices else None


def _find_mapped(name: str, devices: Collection[str]) -> str | None:
    """The logical volume that device-mapper calls ``vg-lv``, hyphens inside doubled."""
    parts = [part.replace("\0", "-") for part in name.replace("--", "\0").split("-")]
    return _known("/dev/" + "/".join(parts), devices)
