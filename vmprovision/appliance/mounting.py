"""Recognise the root of an operating system, and mount what its fstab mounts on it."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from vmprovision.appliance.filesystem import ApplianceFilesystem
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.disklayout.subvolumes import split_subvolume, subvolume_options
from vmprovision.errors import InspectionError
from vmprovision.filesystem.protocol import read_text, resolve, status_of
from vmprovision.inspection.bootmenu import named_subvolumes
from vmprovision.inspection.layout import DIRECTORIES
from vmprovision.inspection.ostree import (
    BOOT,
    OF_A_BOOT,
    enter_deployment,
    find_covering,
    lacks_boot,
)
from vmprovision.inspection.watched import WatchedReader
from vmprovision.mounts import HiddenMount, covering_mounts, read_fstab

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from vmprovision.appliance.devicenames import DeviceNames
    from vmprovision.appliance.session import Appliance
    from vmprovision.appliance.snapshots import NewSnapshot
    from vmprovision.filesystem.protocol import GuestFilesystem, GuestReader
    from vmprovision.mounts import GuestMount
    from vmprovision.mounts.fstab import FstabLine

log = logging.getLogger(__name__)

OperatingSystem = Literal["linux", "windows", "bsd", "hurd"]

# Directories that inspection reads, besides those that a plan may write to.
READ = (
    *("/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib64", "/bin", "/sbin", "/lib", "/lib64"),
    *("/var/lib", "/var/lib/dpkg", "/opt", "/boot", "/boot/efi"),
)
WATCHED = tuple(PurePosixPath(path) for path in (*DIRECTORIES, *READ))
ON_DEMAND = (PurePosixPath("/boot"), PurePosixPath("/boot/efi"))  # mounted even if `noauto`
MOUNTS_LIMIT = 64
# A filesystem with two of these names is taken for what fstab mounts there.
CONTENT = {
    "/usr": frozenset(("bin", "lib", "sbin", "share", "libexec")),
    "/usr/local": frozenset(("bin", "lib", "sbin", "share", "etc", "include", "games", "src")),
    "/var": frozenset(("lib", "log", "cache", "spool", "tmp")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A filesystem that holds an operating system.

    Attributes:
        device: its name in libguestfs (``/dev/sda1``, ``btrfsvol:/dev/sda2/@``).
        system: the kind of operating system.
        name: the name in its release file, or its kind.
        subvolume: the btrfs subvolume that its own boot menu or fstab mounts at ``/``, if it
            names one.
        fstab: the lines of its own fstab.
    """

    device: str
    system: OperatingSystem
    name: str
    subvolume: str | None = None
    fstab: tuple[FstabLine, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MountedGuest:
    """The guest, mounted in the appliance at ``/``.

    Attributes:
        root: the chosen root.
        mountpoints: guest directory -> device, for the root and what its fstab adds.
        hidden: mounts of the guest over directories that matter, which are not mounted here.
        notes: notes on the guest's other mounts.
        snapshot: the new snapshot that is mounted in place of a read-only one.
    """

    filesystem: GuestFilesystem
    root: Root
    mountpoints: Mapping[str, str]
    hidden: tuple[HiddenMount, ...] = ()
    notes: tuple[str, ...] = ()
    snapshot: NewSnapshot | None = None


def unix_root(reader: GuestReader, device: str) -> Root | None:
    """Return the root on a device; None if its files are not those of a root."""
    system = recognise_system(reader)
    if system is None:
        return None
    lines = tuple(read_fstab(reader))
    return Root(
        device=device,
        system=system,
        name=_name(reader),
        subvolume=_booted_subvolume(reader, device) or _own_subvolume(lines),
        fstab=lines,
    )


def recognise_system(reader: GuestReader) -> OperatingSystem | None:
    """Return the kind of operating system whose root this is; None if it is not a root.

    A root may hold only ``/etc`` and links into a ``/usr`` on another filesystem. So a
    release file is enough, and so is a program that the kernel would start.
    """
    there = [name for name in reader.list_directory(PurePosixPath("/")) if name != "lost+found"]
    if not there or is_usr(there):
        return None
    if "hurd" in there and _exists(reader, "/hurd/init"):
        return "hurd"
    if _exists(reader, "/bin/freebsd-version") or _exists(reader, "/etc/rc.subr"):
        return "bsd"
    etc = reader.list_directory(PurePosixPath("/etc"))
    released = any(_RELEASE.match(name) for name in etc) or _exists(reader, "/usr/lib/os-release")
    starts = any(_is_present(reader, path) for path in ("/sbin/init", "/etc/init", "/bin/init"))
    shell = _is_present(reader, "/bin/sh") and bool(etc)
    special = _exists(reader, "/nix/store") or _exists(reader, "/ostree/deploy")
    special = special or _exists(reader, "/gnu/store")
    return "linux" if released or starts or shell or special else None


def is_usr(names: Collection[str]) -> bool:
    """Return whether this is a separate ``/usr``, whose bin, sbin and lib look like a root's."""
    bare = {"bin", "lib"} <= set(names) and not {"etc", "dev", "proc", "init"} & set(names)
    return "usr" not in names and ("share" in names or bare)


_RELEASE = re.compile(r"(?:.+-release|.+_version|os-release|openwrt_release)$")


def _exists(reader: GuestReader, path: str) -> bool:
    return status_of(reader, PurePosixPath(path)) is not None


def _is_present(reader: GuestReader, path: str) -> bool:
    """Return whether a path exists, even as a link into another filesystem."""
    return reader.lstat(PurePosixPath(path)) is not None or _exists(reader, path)


def _name(reader: GuestReader) -> str:
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        text = read_text(reader, PurePosixPath(path)) or ""
        if match := re.search(r'^PRETTY_NAME=["\']?([^"\'\n]{1,80})', text, re.MULTILINE):
            return match[1]
    return "Linux"


def _booted_subvolume(reader: GuestReader, device: str) -> str | None:
    """Return the subvolume that the boot menu in a subvolume names; its snapshots name it too."""
    here = split_subvolume(device)[1]
    said = named_subvolumes(WatchedReader(reader), here, lambda _device: False) if here else ()
    named = [each for each in said if each]
    return named[0].partition("subvol=")[2] or None if len(said) == len(named) == 1 else None


def _own_subvolume(lines: Iterable[FstabLine]) -> str | None:
    """Return the subvolume that a root's own fstab mounts at ``/``; its snapshots name it too."""
    for line in lines:
        if line.mountpoint == "/":
            named = dict(option.partition("=")[::2] for option in line.options.split(","))
            return named.get("subvol", "").strip("/") or None
    return None


def mount_root(
    appliance: Appliance, device: str, *, readonly: bool, driver: str = ""
) -> ApplianceFilesystem:
    """Mount a root and return its files.

    Args:
        appliance: has the device.
        device: the device to mount.
        readonly: mount without writing.
        driver: the kernel's filesystem; if empty, mount(8) probes for it.

    Raises:
        InspectionError: it cannot be mounted.
    """
    try:
        return mount_device(appliance, device, readonly=readonly, driver=driver)
    except ApplianceCallError as exc:
        raise InspectionError(
            f"{device} cannot be mounted on /: {exc.message}",
            hint="check the guest's filesystem with fsck",
        ) from exc


def mount_device(
    appliance: Appliance, device: str, *, readonly: bool, driver: str
) -> ApplianceFilesystem:
    """Mount a root as ``mount_root`` does, but raise the appliance's own error.

    Raises:
        ApplianceCallError: it cannot be mounted.
    """
    if driver:
        node, options = subvolume_options(device)
        appliance.mount(node, driver, "/", readonly=readonly, options=options)
    else:
        appliance.call("mount_options", _access(readonly=readonly), device, "/")
    return ApplianceFilesystem(appliance)


def _access(*, readonly: bool) -> str:
    """Return the mount options; reading a guest's files changes no access times."""
    return "ro,noatime" if readonly else "rw,noatime"


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedMount:
    """A mount of the guest that matters here.

    Attributes:
        device: its name in the appliance; None if the image does not hold it.
        is_guess: the guest's name is for a disk that is likely, but not surely, this one.
    """

    mount: GuestMount
    device: str | None
    is_guess: bool = False


def wanted_mounts(reader: GuestReader, root: Root, names: DeviceNames) -> list[WantedMount]:
    """Return the guest's mounts that matter, parents first.

    Args:
        reader: the root's files.
        root: the mounted root; its own line of fstab names the guest's disk.
        names: the names of the image's devices.
    """
    for line in root.fstab:
        if line.mountpoint == "/":
            names.learn(line.source, root.device)
    wanted = []
    for mount in covering_mounts(reader, WATCHED):
        device = names.find(mount.source) if mount.is_device else None
        guesses = names.guesses(mount.source) if mount.is_device and not device else ()
        if len(guesses) == 1 and str(mount.place) in CONTENT:
            wanted.append(WantedMount(mount=mount, device=guesses[0], is_guess=True))
        else:
            wanted.append(WantedMount(mount=mount, device=device))
    return wanted


@dataclass(slots=True)
class Mounting:
    """A guest whose root is mounted, and whose other mounts follow.

    Attributes:
        driver_of: returns the kernel's filesystem on a device; "" lets mount(8) probe.
        done: the mounts that were tried, each with why it failed, or "".
    """

    appliance: Appliance
    files: ApplianceFilesystem
    root: Root
    names: DeviceNames
    readonly: bool
    driver_of: Callable[[str], str] = field(default=lambda _device: "")
    mountpoints: dict[str, str] = field(default_factory=dict)
    done: dict[GuestMount, str] = field(default_factory=dict)

    def mount_wanted(self) -> MountedGuest:
        """Mount all that can be mounted; a mounted filesystem may name more mounts."""
        self.mountpoints["/"] = self.root.device
        wanted = wanted_mounts(self.files, self.root, self.names)
        while todo := [entry for entry in wanted if self._is_due(entry)]:
            self.done[todo[0].mount] = self._mount(todo[0])
            wanted = wanted_mounts(self.files, self.root, self.names)
        return self._mounted(wanted)

    def _is_due(self, entry: WantedMount) -> bool:
        here = entry.mount.at_boot or entry.mount.place in ON_DEMAND
        room = len(self.done) < MOUNTS_LIMIT
        return here and room and entry.device is not None and entry.mount not in self.done

    def _mount(self, entry: WantedMount) -> str:
        """Mount one; return why that failed, or ""."""
        device, place = str(entry.device), entry.mount.place
        if entry.is_guess and device in self.mountpoints.values():
            return entry.mount.obstacle
        if str(place) in self.mountpoints:
            same = self.mountpoints[str(place)] == device
            return "" if same else "something else is mounted there too"
        if why := self._mount_on(device, entry.mount):
            return why
        if entry.is_guess:
            if len(CONTENT[str(place)].intersection(self.files.list_directory(place))) <= 1:
                self.appliance.unmount(str(place))
                self.files.mounted_on(place)
                return entry.mount.obstacle
            self.names.learn(entry.mount.source, device)
        self.mountpoints[str(place)] = device
        return ""

    def _mount_on(self, device: str, mount: GuestMount) -> str:
        """Mount a device of the guest; return why that failed, or "".

        The appliance mounts outside the guest's root. Through a link of the guest it would
        mount over its own directories, and run the guest's programs in place of its own.
        So the mount point must be a real directory.
        """
        place = mount.place
        try:
            status = self.files.lstat(place)
            if status is None or status.kind != "directory" or resolve(self.files, place) != place:
                return "there is no such directory"
            kept = [option for option in mount.options if option.startswith("subvol")]
            self._mount_at(device, place, kept)
        except (ApplianceCallError, InspectionError) as exc:
            log.info("cannot mount %s on %s: %s", device, place, exc.message)
            return f"{device} cannot be mounted: {exc.message}"
        return ""

    def _mount_boot(self) -> None:
        """Mount the ``/boot`` of an OSTree guest, if only one filesystem can be it."""
        found = [device for device in self.names.devices if self._is_boot(device)]
        if len(found) == 1:
            self._mount_at(found[0], BOOT, ())
            self.mountpoints[str(BOOT)] = found[0]

    def _is_boot(self, device: str) -> bool:
        """Return whether a filesystem has what ostree makes in a ``/boot`` of its own."""
        if device in self.mountpoints.values():
            return False
        try:
            self._mount_at(device, BOOT, ())
        except ApplianceCallError as exc:  # swap, boot code, or damaged
            log.info("%s is not /boot: %s", device, exc.message)
            return False
        names = self.files.list_directory(BOOT)
        self.appliance.unmount(str(BOOT))
        self.files.mounted_on(BOOT)
        return OF_A_BOOT.issubset(names)

    def _mount_at(self, device: str, place: PurePosixPath, options: Iterable[str]) -> None:
        """Mount a device on a real directory of the guest.

        Raises:
            ApplianceCallError: it cannot be mounted.
        """
        if driver := self.driver_of(device):
            self.appliance.mount(
                device, driver, str(place), readonly=self.readonly, options=",".join(options)
            )
        else:
            flags = ",".join([_access(readonly=self.readonly), *options])
            self.appliance.call("mount_options", flags, device, str(place))
        self.files.mounted_on(place)

    def _mounted(self, wanted: Iterable[WantedMount]) -> MountedGuest:
        hidden, notes = [], []
        for entry in wanted:
            mount = entry.mount
            if not mount.at_boot:
                if mount.place not in ON_DEMAND:
                    notes.append(f"{mount.sentence}, but not at boot (noauto)")
            elif why := self.done.get(mount, mount.obstacle):
                hidden.append(HiddenMount(mount=mount, why=why))
        if str(BOOT) not in self.mountpoints and lacks_boot(self.files):
            self._mount_boot()
        filesystem = enter_deployment(self.files)
        if filesystem is not self.files:
            hidden = [*hidden, *find_covering(filesystem)]
        return MountedGuest(
            filesystem=filesystem,
            root=self.root,
            mountpoints=self.mountpoints,
            hidden=tuple(hidden),
            notes=tuple(notes),
        )
