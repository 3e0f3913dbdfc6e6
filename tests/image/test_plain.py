"""A guest that is found by the disk's structures is the one that libguestfs's search finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.image.composed import Part, compose_disk, ext4
from tests.image.layouts import BAD, GOOD
from tests.trees import OS_RELEASE, SYSTEMD_TREE, Link
from vmprovision.appliance.firstbytes import read_contents
from vmprovision.appliance.plain import mount_plain_guest
from vmprovision.appliance.roots import SOLE_DISK, mount_found_guest, mount_guest
from vmprovision.appliance.session import Drive, launch, open_appliance
from vmprovision.appliance.volumes import open_layers
from vmprovision.disklayout.partitions import UnclearLayoutError
from vmprovision.disklayout.superblocks import START_SIZE, identify
from vmprovision.errors import InspectionError, VmprovisionError
from vmprovision.inspection import inspect_guest
from vmprovision.progress import Control

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tests.image.layouts import Disks
    from vmprovision.appliance.mounting import MountedGuest
    from vmprovision.appliance.session import Appliance

pytestmark = pytest.mark.appliance

BOOT_UUID = "0f0e0d0c-0b0a-4908-8706-050403020100"
BOOT_FILES = {
    "/grub/grub.cfg": "linux /vmlinuz init=/usr/bin/dash\n",
    "/vmlinuz-6.1": b"k",
    "/efi": None,
}
GRUB = Part(line="type=21686148-6449-6E6F-744E-656564454649", size_mb=1)
ESP = Part(line="type=U", maker=("mkfs.vfat", "-n", "UEFI"), size_mb=8)
SWAP = Part(line="type=82", maker=("mkswap",))
SLEEPING = Part(line="type=82", maker=("mkswap",), patch={4086: b"S1SUSPEND\0"})


def root(*fstab: str, line: str = "", mounted: str = "") -> Part:
    """A root partition whose fstab has these lines."""
    options = ("-M", mounted) if mounted else ()
    text = "".join(f"{each}\n" for each in fstab)
    files = {**SYSTEMD_TREE, "/etc/fstab": text, "/boot": None}
    return ext4(line, *options, files=files)


def boot(*options: str) -> Part:
    """A partition for /boot with a kernel and a boot loader's configuration."""
    return ext4("", "-U", BOOT_UUID, *options, files=BOOT_FILES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A disk, and whether it is plain."""

    parts: Sequence[Part]
    plain: bool
    label: str = "label: gpt"
    slow: bool = False
    searchable: bool = True  # libguestfs lists sixty partitions longer than a call may take


CASES: Mapping[str, Case] = {
    "cloud": Case(
        parts=(
            root("LABEL=BOOT /boot ext4 defaults 0 2", "LABEL=UEFI /boot/efi vfat defaults 0 1"),
            GRUB,
            ESP,
            boot("-L", "BOOT"),
        ),
        plain=True,
    ),
    "boot-first": Case(
        parts=(boot(), SWAP, root(f"UUID={BOOT_UUID} /boot ext4 defaults 0 2", mounted="/")),
        label="label: dos",
        plain=True,
        slow=True,
    ),
    "stale-fstab": Case(
        parts=(root("UUID=00000000-dead-beef-0000-000000000000 /boot ext4 defaults 0 2"),),
        label="label: dos",
        plain=True,
        slow=True,
    ),
    "boot-is-a-link": Case(
        parts=(
            ext4(
                files={
                    **SYSTEMD_TREE,
                    "/boot": Link("/tmp"),  # noqa: S108 -- the appliance's, if it were followed there
                    "/etc/fstab": f"UUID={BOOT_UUID} /boot ext4 defaults 0 2\n",
                }
            ),
            boot(),
        ),
        plain=True,
    ),
    "two-roots-one-as-boot": Case(
        parts=(
            root(f"UUID={BOOT_UUID} /boot ext4 defaults 0 2", mounted="/"),
            ext4("", "-U", BOOT_UUID, files={"/etc/os-release": OS_RELEASE}),
        ),
        plain=False,
    ),
    "home": Case(
        parts=(root(), ext4(files={"/me/file": "x"})), label="label: dos", plain=True, slow=True
    ),
    "var": Case(
        parts=(
            root("LABEL=var /var ext4 defaults 0 2", mounted="/"),
            ext4("", "-L", "var", files={"/log": None}),
        ),
        plain=True,
        slow=True,
    ),
    "sleeping": Case(parts=(root(), SLEEPING), label="label: dos", plain=False, slow=True),
    "unknown-content": Case(
        parts=(root(), Part(line="", maker=("true",), patch={4000: b"who knows"})),
        plain=False,
        slow=True,
    ),
    "empty-table": Case(parts=(), plain=False, slow=True),
    "sixty-empty-partitions": Case(
        parts=(*[Part(line="", size_mb=1) for _ in range(60)], root()),
        plain=True,
        searchable=False,
    ),
    "logical": Case(
        parts=(
            SWAP,
            Part(line="2: type=5", size_mb=40),
            root("/dev/sda6 /boot ext4 defaults 0 2", line="5: type=83", mounted="/"),
            ext4("6: type=83", "-U", BOOT_UUID, files=BOOT_FILES),
        ),
        label="label: dos",
        plain=True,
        slow=True,
    ),
}
PLAIN_LAYOUTS = (
    *("whole", "xfs", "odd-links", "in-the-way", "full"),
    *("gpt-split", "lvm", "btrfs", "mbr-logical"),
)
FIRST = ("btrfs", "lvm")


def compare(
    image: Path, kind: str, *, plain: bool, stock: bool = False, searchable: bool = True
) -> None:
    """See all ways find the same, and whether the quickest one was enough for it."""
    opener = launch if stock else open_appliance
    drives = [Drive(path=image, format=kind, readonly=True)]
    with opener(drives, control=Control()) as appliance:
        mounted = quickly_mounted(appliance)
        assert (mounted is not None) == plain
        expected = dict.fromkeys(mounted.mountpoints, "rw") if mounted else {}
        assert mounts_of(appliance) == expected
        appliance.unmount()
        quick = found(appliance, quick_mount)
        looked = found(appliance, looking_mount)
        assert appliance.has_volumes == stock or not plain
        assert looked == quick
        if searchable:
            assert found(appliance, searching_mount) == quick


def quickly_mounted(appliance: Appliance) -> MountedGuest | None:
    """Return the guest of a disk whose structures say where it is."""
    try:
        contents = read_contents(appliance, [SOLE_DISK])
    except (UnclearLayoutError, InspectionError):
        return None
    return mount_plain_guest(appliance, contents, readonly=False)


def quick_mount(appliance: Appliance) -> MountedGuest:
    """Mount the guest as a command does."""
    return mount_guest(appliance, wanted=None, readonly=True, disk=SOLE_DISK)


def looking_mount(appliance: Appliance) -> MountedGuest:
    """Mount the guest after a look into every filesystem, those that the structures name."""
    return mount_guest(appliance, wanted=None, readonly=True)


def searching_mount(appliance: Appliance) -> MountedGuest:
    """Mount the guest after a search by libguestfs."""
    layers = open_layers(appliance, None, ())
    return mount_found_guest(appliance, None, layers, readonly=True)


def found(appliance: Appliance, mount: Callable[[Appliance], MountedGuest]) -> tuple[object, ...]:
    """Return the guest and all that inspection says of it, or the refusal."""
    try:
        mounted = mount(appliance)
    except VmprovisionError as exc:
        return type(exc), exc.message, exc.hint
    assert mounts_of(appliance) == dict.fromkeys(mounted.mountpoints, "ro")
    files, places = mounted.filesystem, mounted.mountpoints
    try:
        guest: object = inspect_guest(files, mountpoints=places, notes=mounted.notes)
    except VmprovisionError as exc:
        guest = exc.message
    appliance.unmount()
    return mounted.root, places, mounted.hidden, mounted.notes, guest


def mounts_of(appliance: Appliance) -> dict[str, str]:
    """Where something is mounted in the guest's root, and whether it can be written to."""
    text = appliance.call("debug", "sh", ["cat /proc/mounts"])
    lines = [line.split() for line in text.splitlines()]
    return {
        fields[1].removeprefix("/sysroot") or "/": fields[3].partition(",")[0]
        for fields in lines
        if fields[1].startswith("/sysroot")
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if case.slow else name
        for name, case in CASES.items()
    ],
)
def test_a_composed_disk(name: str, tmp_path: Path) -> None:
    """Both ways find the same root, mounts, notes and facts, or refuse alike."""
    case = CASES[name]
    image = compose_disk(tmp_path / "disk.raw", case.label, case.parts)
    compare(image, "raw", plain=case.plain, searchable=case.searchable)


@pytest.mark.parametrize(
    "name",
    [
        name if name in FIRST else pytest.param(name, marks=pytest.mark.slow)
        for name in (*GOOD, *BAD)
    ],
)
def test_every_layout(name: str, disks: Disks) -> None:
    """Likewise for the disks that other tests inject into."""
    layout = disks.layouts[name]
    compare(disks.path(name), layout.format, plain=name in PLAIN_LAYOUTS)


RAID = (
    "mdadm --create /dev/md7 --run --metadata={} --level=1 --raid-devices=2 /dev/sda1 missing "
    "&& mke2fs -q -t ext4 /dev/md7 && mount /dev/md7 /sysroot "
    "&& mkdir -p /sysroot/etc && echo ID=debian >/sysroot/etc/os-release "
    "&& umount /sysroot && mdadm --stop /dev/md7"
)


@pytest.mark.slow
@pytest.mark.parametrize("metadata", ["0.90", "1.0"])
def test_a_member_of_an_old_raid(metadata: str, tmp_path: Path) -> None:
    """Its superblock is at the partition's end, its filesystem at the beginning."""
    image = compose_disk(tmp_path / "disk.raw", "label: dos", [Part(line="type=83", size_mb=24)])
    with launch([Drive(path=image, format="raw")], control=Control()) as appliance:
        appliance.call("debug", "sh", [RAID.format(metadata)])
    with image.open("rb") as file:
        file.seek(1 << 20)
        block = identify(file.read(START_SIZE))
    assert block is not None
    assert block.kind == "ext"
    compare(image, "raw", plain=False)
