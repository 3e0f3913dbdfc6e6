"""Disks that lie as users' disks lie, all made of one small real Debian.

Each is made when a test first asks for it, and kept in the cache, with the tree that it
holds, under a hash of this file. A test works on a copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conftest import locked
from tests.image.trees import Mount, Sight, Tree, as_json, from_json, on_drive, read_tree
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.host.cache import cache_directory
from vmprovision.progress import Control
from vmprovision.recipe import parse_recipe
from vmprovision.recipe.packages import make_guest_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmprovision.appliance.session import Appliance

TAR_SECONDS = 900.0
UNUSED_SECONDS = 7 * 24 * 3600.0  # after which the disks of another version of this file go
RECIPE = """\
description = "a Debian that nobody boots"
architecture = "amd64"
suite = "{suite}"
variant = "minbase"
packages = ["systemd-sysv", "python3-minimal"]
leave_out = [
  "/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*",
  "/usr/share/zoneinfo/*", "/usr/lib/udev/hwdb.d/*", "/usr/lib/x86_64-linux-gnu/gconv/*",
]

[disk]
size_mb = 32
partition_table = "none"
filesystem = "ext4"
features = []
uuid = "5b1a3c0e-0d3f-4c57-9a52-6f1d7d9a12fe"
bootloader = "none"
command_line = "quiet"
"""
# Nobody runs these guests, so what is large and not looked at is left out.
LARGEST = 1 << 15
NEEDED = ("python3.9", "python3.11", "python3.13", "systemd", "status")
HALF_MB, MB = 1024, 2048  # in sectors

# What stands in the way of an injection, for `remove` to bring back.
OWN_AGENT = b"\x7fELF\0\xff somebody's own guest-agent, no newline at the end"
OWN_RC_LOCAL = b"#!/bin/sh -e\necho hello\n\nexit 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One disk: how it is made, and how its filesystems lie."""

    make: Callable[[Making], None]
    mounts: tuple[Mount, ...] = (Mount(device="1"),)
    format: str = "qcow2"
    size_mb: int = 320
    suites: tuple[str, ...] = ("bookworm",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """A disk that is being made: its appliance, and the trees to put on it."""

    appliance: Appliance
    tars: Mapping[str, Path]

    def device(self, part: str = "") -> str:
        """Return the appliance's name of a partition, or of the whole disk."""
        return on_drive(0, part)

    def call(self, name: str, *arguments: object, **options: Any) -> str:  # noqa: ANN401 -- of the API
        """Call into the appliance."""
        return str(self.appliance.call(name, *arguments, **options))

    def partition(self, kind: str, *sizes_mb: int) -> None:
        """Make primary partitions of these sizes, the last one as large as the disk allows."""
        self.call("part_init", self.device(), kind)
        start = MB
        for size in sizes_mb:
            end = start + size * MB - 1
            self.call("part_add", self.device(), "primary", start, end)
            start = end + 1
        self.call("part_add", self.device(), "primary", start, -MB)

    def mkfs(self, kind: str, part: str) -> str:
        """Make a filesystem on a partition; its UUID."""
        self.call("mkfs", kind, self.device(part))
        return self.call("vfs_uuid", self.device(part))

    def unpack(self, suite: str = "bookworm") -> None:
        """Put the tree into what is mounted."""
        self.appliance.call("tar_in", str(self.tars[suite]), "/", xattrs=True, limit=TAR_SECONDS)

    def write(self, path: str, content: bytes, *, mode: int = 0o644, owner: int = 0) -> None:
        """Write a guest file."""
        self.call("write", path, content)
        self.call("chown", owner, owner, path)
        self.call("chmod", mode, path)

    def fstab(self, *lines: str) -> None:
        """Write the guest's fstab."""
        self.write("/etc/fstab", "".join(f"{line}\n" for line in lines).encode())


def _mbr_logical(making: Making) -> None:
    """Put the root into a logical partition, behind a swap partition."""
    device = making.device()
    making.call("part_init", device, "mbr")
    making.call("part_add", device, "primary", MB, 9 * MB - 1)
    making.call("part_add", device, "extended", 9 * MB, -MB)
    making.call("part_add", device, "logical", 10 * MB, -MB)
    making.call("mkswap", making.device("1"))
    making.mkfs("ext4", "5")
    making.call("mount", making.device("5"), "/")
    making.unpack()
    making.fstab("/dev/sda5 / ext4 defaults 0 1", "/dev/sda1 none swap sw 0 0")


def _gpt_split(making: Making) -> None:
    """Make a GPT with separate /boot and /usr, named in fstab by UUID, LABEL and PARTUUID."""
    making.partition("gpt", 32, 200)
    uuids = [making.mkfs("ext4", str(number)) for number in (1, 2, 3)]
    making.call("set_label", making.device("1"), "boot-part")
    for part, place in (("3", "/"), ("1", "/boot"), ("2", "/usr")):
        if place != "/":
            making.call("mkdir", place)
        making.call("mount", making.device(part), place)
    making.unpack()
    partuuid = making.call("part_get_gpt_guid", making.device(), 2)
    making.fstab(
        "# a comment, then a line that names what the image has not",
        f"UUID={uuids[2]} / ext4 errors=remount-ro 0 1",
        "LABEL=boot-part /boot ext4 defaults 0 2",
        f"PARTUUID={partuuid.lower()} /usr ext4 defaults 0 2",
        "UUID=00000000-dead-beef-0000-000000000000 /opt ext4 defaults 0 2",
        "tmpfs /var/log tmpfs size=1M 0 0",
    )


def _lvm(making: Making) -> None:
    """Make root and /var logical volumes."""
    making.appliance.activate_volumes()
    making.partition("mbr")
    making.call("pvcreate", making.device("1"))
    making.call("vgcreate", "guest-vg", [making.device("1")])
    making.call("lvcreate", "root", "guest-vg", 220)
    making.call("lvcreate", "var", "guest-vg", 64)
    for name in ("root", "var"):
        making.call("mkfs", "ext4", f"/dev/guest-vg/{name}")
    making.call("mount", "/dev/guest-vg/root", "/")
    making.call("mkdir", "/var")
    making.call("mount", "/dev/guest-vg/var", "/var")
    making.unpack()
    making.fstab(
        "/dev/mapper/guest--vg-root / ext4 defaults 0 1",
        "/dev/mapper/guest--vg-var /var ext4 defaults 0 2",
    )


def _whole(making: Making) -> None:
    """Make a disk without a partition table, and an fstab with a hypervisor's name of the disk."""
    making.mkfs("ext4", "")
    making.call("mount", making.device(), "/")
    making.unpack()
    making.fstab("/dev/vda / ext4 defaults 0 1")


def _btrfs(making: Making) -> None:
    """Make subvolumes as Ubuntu has them; @ is a restored snapshot, and the old root is there."""
    making.partition("gpt")
    uuid = making.mkfs("btrfs", "1")
    making.call("mount", making.device("1"), "/")
    for name in ("/@before-rollback", "/@home", "/@var"):
        making.call("btrfs_subvolume_create", name)
    making.call("umount_all")
    making.call("mount_options", "subvol=@before-rollback", making.device("1"), "/")
    making.call("mkdir", "/var")
    making.call("mount_options", "subvol=@var", making.device("1"), "/var")
    making.unpack()
    making.fstab(
        f"UUID={uuid} / btrfs defaults,subvol=@ 0 0",
        f"UUID={uuid} /home btrfs defaults,subvol=/@home 0 0",
        f"UUID={uuid} /var btrfs defaults,subvol=/@var 0 0",
    )
    making.call("umount_all")
    making.call("mount", making.device("1"), "/")
    making.call("btrfs_subvolume_snapshot", "/@before-rollback", "/@")
    making.call("btrfs_subvolume_snapshot", "/@", "/snapshot-of-today", ro=True)


def _xfs(making: Making) -> None:
    """Make XFS on a GPT."""
    making.partition("gpt")
    uuid = making.mkfs("xfs", "1")
    making.call("mount", making.device("1"), "/")
    making.unpack()
    making.fstab(f"UUID={uuid} / xfs defaults 0 1")


def _two_systems(making: Making) -> None:
    """Put two releases of Debian beside each other."""
    making.partition("gpt", 240)
    for part, suite in (("1", "bullseye"), ("2", "trixie")):
        making.mkfs("ext4", part)
        making.call("mount", making.device(part), "/")
        making.unpack(suite)
        making.call("umount_all")


def _odd_links(making: Making) -> None:
    """Make all absolute links, even /etc and /usr/local; keep only the vendor's os-release."""
    _whole(making)
    making.call("mkdir", "/data")
    for place, real in (("/etc", "/data/etc"), ("/usr/local", "/var/usrlocal")):
        making.call("mv", place, real)
        making.call("ln_s", real, place)
    for name in ("bin", "sbin", "lib", "lib64"):
        making.call("rm", f"/{name}")
        making.call("ln_s", f"/usr/{name}", f"/{name}")
    making.call("rm", "/data/etc/os-release")


def _in_the_way(making: Making) -> None:
    """Put files with odd names and modes where an injection wants to write."""
    _whole(making)
    making.write("/usr/local/bin/guest-agent", OWN_AGENT, mode=0o711, owner=1234)
    making.call("ln_s", "../opt/own.conf", "/etc/guest-agent.conf")
    making.call("lchown", 12, 34, "/etc/guest-agent.conf")
    making.write("/opt/own.conf", b"OWN=1\n", mode=0o640)
    making.write("/etc/rc.local", OWN_RC_LOCAL, mode=0o640, owner=77)
    making.call("mkdir_mode", "/usr/local/lib/guest-agent", 0o2750)


def _full(making: Making) -> None:
    """Fill the filesystem to the last block."""
    _whole(making)
    sizes = ("1M", "512")
    fill = "".join(f"dd if=/dev/zero of=/sysroot/opt/ballast-{size} bs={size}; " for size in sizes)
    making.call("debug", "sh", [f"exec 2>&1; {fill}sync"])


def _hibernated(making: Making) -> None:
    """Make a swap partition that holds a hibernated system."""
    making.partition("mbr", 8)
    making.mkfs("ext4", "2")
    making.call("mount", making.device("2"), "/")
    making.call("mkdir_p", "/etc")
    making.write("/etc/os-release", b"ID=debian\n")
    making.call("umount_all")
    making.call("mkswap", making.device("1"))
    making.call("pwrite_device", making.device("1"), b"S1SUSPEND\0", 4086)


def _windows(making: Making) -> None:
    """Make what libguestfs recognises as a Windows disk."""
    making.partition("mbr")
    making.call("part_set_mbr_id", making.device(), 1, 7)
    making.mkfs("ntfs", "1")
    making.call("mount", making.device("1"), "/")
    making.call("mkdir_p", "/Windows/System32/config")
    making.write("/Windows/System32/ntoskrnl.exe", b"MZ")


def _bsd(making: Making) -> None:
    """Make a slice of FreeBSD's type, whose filesystem Linux cannot read."""
    making.partition("mbr")
    making.call("part_set_mbr_id", making.device(), 1, 0xA5)


def _nothing(_making: Making) -> None:
    """Leave the disk empty."""


GOOD: dict[str, Layout] = {
    "mbr-logical": Layout(make=_mbr_logical, mounts=(Mount(device="5"),)),
    "gpt-split": Layout(
        make=_gpt_split,
        mounts=(Mount(device="3"), Mount(device="1", at="/boot"), Mount(device="2", at="/usr")),
    ),
    "lvm": Layout(
        make=_lvm,
        format="vmdk",
        mounts=(
            Mount(device="/dev/guest-vg/root"),
            Mount(device="/dev/guest-vg/var", at="/var"),
        ),
    ),
    "whole": Layout(make=_whole, format="raw", mounts=(Mount(device=""),)),
    "btrfs": Layout(
        make=_btrfs,
        format="vdi",
        mounts=(
            Mount(device="1", options="subvol=@"),
            Mount(device="1", at="/var", options="subvol=@var"),
        ),
    ),
    "xfs": Layout(make=_xfs, format="vhdx", size_mb=400),
    "odd-links": Layout(make=_odd_links, mounts=(Mount(device=""),)),
    "in-the-way": Layout(make=_in_the_way, mounts=(Mount(device=""),)),
    "two-systems": Layout(
        make=_two_systems,
        size_mb=480,
        suites=("bullseye", "trixie"),
        mounts=(Mount(device="2"), Mount(device="1", at="/mnt")),
    ),
}
BAD: dict[str, Layout] = {
    "full": Layout(make=_full, size_mb=96, mounts=()),
    "hibernated": Layout(make=_hibernated, size_mb=24, suites=(), mounts=()),
    "windows": Layout(make=_windows, size_mb=24, suites=(), mounts=()),
    "bsd": Layout(make=_bsd, size_mb=16, suites=(), mounts=()),
    "nothing": Layout(make=_nothing, size_mb=16, suites=(), mounts=()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Disks:
    """The disks in the cache: read them, write to copies only."""

    folder: Path
    layouts: Mapping[str, Layout] = field(default_factory=lambda: {**GOOD, **BAD})

    def path(self, name: str) -> Path:
        """Return the disk of this name; make it, which takes some seconds, if nobody has yet."""
        path = self.folder / f"{name}.{self.layouts[name].format}"
        with locked(self.folder / f"{name}.lock"):
            if not path.exists():
                _make(self.layouts[name], path)
        return path

    def tree(self, name: str) -> Tree:
        """Return what the disk held when it was made."""
        return from_json(json.loads(self.path(name).with_suffix(".json").read_text("ascii")))

    def copy(self, name: str, folder: Path) -> Path:
        """Return a copy of the disk that a test may write to."""
        target = folder / self.path(name).name
        subprocess.run(["cp", "--sparse=always", self.path(name), target], check=True)
        target.chmod(0o644)
        return target

    def sight(self, name: str, path: Path) -> Sight:
        """Return how to look into a copy of this disk."""
        layout = self.layouts[name]
        return Sight(path=path, format=layout.format, mounts=layout.mounts)


def cached_disks() -> Disks:
    """Return the disks of the cache; remove those that nobody has used for a week."""
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    cache = cache_directory() / "tests"
    folder = cache / f"disks-{key}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.utime(folder)
    for other in cache.glob("disks-*"):
        if other.stat().st_mtime < time.time() - UNUSED_SECONDS:
            shutil.rmtree(other, ignore_errors=True)
    return Disks(folder=folder)


def guest_tar(suite: str) -> Path:
    """Return a release of Debian as a small tar archive, from the cache or this host's mirrors."""
    key = hashlib.sha256(f"{RECIPE}{LARGEST}{NEEDED}".encode()).hexdigest()[:16]
    folder = cache_directory() / "tests" / f"debian-{suite}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    small = folder / "small.tar"
    with locked(folder / "lock"):
        if not small.exists():
            _make_tar(suite, folder, small)
    return small


def _make_tar(suite: str, folder: Path, small: Path) -> None:
    (folder / "files").mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE.format(suite=suite), encoding="utf-8")
    whole, partial = folder / "whole.tar", folder / "partial.tar"
    make_guest_files(parse_recipe(folder), whole)
    with tarfile.open(whole) as source, tarfile.open(partial, "w") as target:
        for member in source:
            if _is_kept(member):
                target.addfile(member, source.extractfile(member) if member.isreg() else None)
    whole.unlink()
    partial.rename(small)


def _is_kept(member: tarfile.TarInfo) -> bool:
    name = member.name.rpartition("/")[2]
    return (
        not member.isdev()
        and not any(folder in member.name for folder in ("/perl", "/var/cache", "/var/lib/apt"))
        and (member.size <= LARGEST or name in NEEDED)
    )


def _make(layout: Layout, path: Path) -> None:
    tars = {suite: guest_tar(suite) for suite in layout.suites}
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made, converted = Path(scratch) / "made.qcow2", Path(scratch) / path.name
        _qemu_img("create", "-f", "qcow2", made, f"{layout.size_mb}M")
        with open_appliance([Drive(path=made, format="qcow2")], control=Control()) as appliance:
            layout.make(Making(appliance=appliance, tars=tars))
            appliance.call("umount_all")
            tree = read_tree(appliance, 0, layout.mounts, Path(scratch)) if layout.mounts else {}
        _qemu_img("convert", "-f", "qcow2", "-O", layout.format, made, converted)
        converted.chmod(0o444)
        path.with_suffix(".json").write_text(json.dumps(as_json(tree)), "ascii")
        converted.rename(path)


def _qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", words[0], "-q", *words[1:]], check=True, capture_output=True)
