"""The root of a btrfs guest is the subvolume that its boot menu names in ``rootflags=``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.stacks import Stack, build_stack, look
from vmprovision.appliance.roots import SOLE_DISK, mount_guest
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.errors import (
    InspectionError,
    SeveralOperatingSystemsError,
    VmprovisionError,
)
from vmprovision.progress import Control

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.appliance

UUID = "5b1a3c0e-0d3f-4c57-9a52-6f1d7d9a1304"
RAW = vmprovision.ImageOptions(format="raw")
SIZE_MB = 256
AGENT = "usr/local/bin/guest-agent"
# A /boot of ext4 and the btrfs.
MAKE = f"""
sfdisk -q $A <<'X'
label: gpt
size=32MiB
type=L
X
udevadm settle
mkfs.ext4 -q -L BOOT ${{A}}1
mkfs.btrfs -q -U {UUID} ${{A}}2
each() {{ # SUBVOLUME FSTAB-OPTIONS [/boot]: make a root in a subvolume
    mount ${{A}}2 -o subvolid=5 /sysroot
    btrfs -q subvolume create /sysroot/$1
    umount /sysroot
    mount ${{A}}2 -o subvol=$1 /sysroot
    guest <<X
UUID={UUID} / btrfs $2 0 0
${{3:+LABEL=BOOT /boot ext4 defaults 0 0}}
X
    umount /sysroot
}}
on() {{ # MOUNT-OPTIONS DEVICE PATH: write a file
    mount -o $1 $2 /sysroot
    mkdir -p $(dirname /sysroot/$3)
    cat >/sysroot/$3
    umount /sysroot
}}
"""


def grub(subvolume: str, more: str = "") -> str:
    """Return a menu that starts this subvolume."""
    return (
        f"{more}\nmenuentry 'Linux' {{ linux /{subvolume}/boot/vmlinuz root=UUID={UUID} ro "
        f"rootflags=subvol={subvolume}; }}\n"
    )


def written(options: str, device: str, path: str, text: str) -> str:
    """Return the script that writes a file on a filesystem of the disk."""
    return f"on {options} {device} {path} <<'X'\n{text}\nX\n"


def entry(options: str) -> str:
    """Return an entry of the Boot Loader Specification."""
    return f"title Linux\nlinux /vmlinuz\noptions root=UUID={UUID} ro {options}"


def with_boot(options: str) -> str:
    """Return the script that puts an entry with these options on /boot, for every root."""
    return written("rw", "${A}1", "loader/entries/linux.conf", entry(options))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A disk, and the subvolume that is its root; or why there is none."""

    script: str
    root: str = ""
    error: type[VmprovisionError] | None = None
    says: str = ""


CASES = {
    # GRUB on btrfs: its own menu takes in a file by a path that begins above the subvolumes
    "grub": Case(
        script="each @old defaults; each @ defaults\n"
        + written("subvol=@old", "${A}2", "boot/grub/grub.cfg", grub("@"))
        + written("subvol=@", "${A}2", "boot/grub/grub.cfg", grub("@", "source /@/boot/more.cfg"))
        + written("subvol=@", "${A}2", "boot/more.cfg", "set timeout=1"),
        root="@",
    ),
    # fstab names another subvolume, and each root has the same /boot
    "boot": Case(
        script="each root.old defaults /boot\n"
        "each root subvol=root.old /boot\n" + with_boot("rootflags=compress=zstd,subvol=root"),
        root="root",
    ),
    # the default subvolume holds a root, and the menu names another one by its number
    "default": Case(
        script="mount ${A}2 /sysroot; echo 'LABEL=BOOT /boot ext4 defaults 0 0' | guest\n"
        "umount /sysroot\neach @new defaults /boot\n" + with_boot("rootflags=subvolid=256"),
        root="@new",
    ),
    # the named one is inside the default subvolume, from where btrfs(8) names it differently
    "inside": Case(
        script="each @ defaults /boot\nmount ${A}2 /sysroot\n"
        "btrfs subvolume set-default 256 /sysroot\numount /sysroot\n"
        "each @/inner defaults /boot\n" + with_boot("rootflags=subvol=@/inner"),
        root="@/inner",
    ),
    # the named one is the default: nothing changes
    "same": Case(
        script="each @ defaults /boot\nmount ${A}2 /sysroot\n"
        "btrfs subvolume set-default 256 /sysroot\numount /sysroot\n"
        + with_boot("rootflags=subvol=@"),
        root="@",
    ),
    "missing": Case(
        script="each @ defaults /boot\n" + with_boot("rootflags=subvol=../@gone"),
        error=InspectionError,
        says="subvol=../@gone, which does not exist",
    ),
    "empty": Case(
        script="each @ defaults /boot\n"
        + written("subvolid=5", "${A}2", "x", "")
        + "mount ${A}2 /sysroot; btrfs -q subvolume create /sysroot/@home; umount /sysroot\n"
        + with_boot("rootflags=subvol=@home"),
        error=InspectionError,
        says="no Linux is there",
    ),
    "undecided": Case(
        script="each @ defaults /boot\neach @a defaults\neach @b defaults\n"
        + with_boot("rootflags=subvol=@a")
        + written("rw", "${A}1", "loader/entries/b.conf", entry("rootflags=subvol=@b")),
        error=SeveralOperatingSystemsError,
        says="do not say which subvolume of /dev/sda2 is the root: subvol=@a, subvol=@b",
    ),
    "unknown": Case(
        script="each @ defaults /boot\n" + with_boot("rootflags=subvolid=many"),
        error=SeveralOperatingSystemsError,
        says="one known only at boot",
    ),
    # two systems, each with a menu that names itself
    "two": Case(
        script="each @a defaults; each @b defaults\n"
        + written("subvol=@a", "${A}2", "boot/grub/grub.cfg", grub("@a"))
        + written("subvol=@b", "${A}2", "boot/grub/grub.cfg", grub("@b")),
        error=SeveralOperatingSystemsError,
        says="the image holds 2 operating systems",
    ),
    # the menu of the named subvolume names the first one again
    "circle": Case(
        script="mount ${A}2 /sysroot; echo | guest; umount /sysroot; each @ defaults\n"
        "each @other defaults\n"
        + written("subvolid=5", "${A}2", "boot/grub/grub.cfg", grub("@"))
        + written("subvol=@", "${A}2", "boot/grub/grub.cfg", grub("@other")),
        error=SeveralOperatingSystemsError,
        says="makes it btrfsvol:/dev/sda2/@other",
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("boot", "grub") else pytest.mark.slow)
        for name in CASES
    ],
)
def test_the_menu_decides(name: str, tmp_path: Path) -> None:
    """The agent comes into the subvolume that boots, and goes; a doubtful one is refused."""
    case = CASES[name]
    disk = build(name, tmp_path)
    if case.error is not None:
        with pytest.raises(case.error) as raised:
            vmprovision.inject(disk, source=RAW)
        assert case.says in raised.value.message
        assert raised.value.hint.startswith("choose")
        return
    report = vmprovision.inject(disk, source=RAW)
    assert report.guest.init.confidence == "certain"
    assert holders(disk) == [case.root]
    vmprovision.remove(disk, source=RAW)
    assert holders(disk) == []


@pytest.mark.slow
def test_the_caller_may_choose_another(tmp_path: Path) -> None:
    """``--root`` wins over the menu, also for a subvolume that does not boot."""
    disk = build("grub", tmp_path)
    chosen = vmprovision.ImageOptions(format="raw", root="btrfsvol:/dev/sda2/@old")
    vmprovision.inject(disk, source=chosen)
    assert holders(disk) == ["@old"]


@pytest.mark.slow
def test_both_ways_find_the_same(tmp_path: Path) -> None:
    """By the disk's structures, and by a look into every filesystem."""
    disk = build("grub", tmp_path)
    drives = [Drive(path=disk, format="raw", readonly=True)]
    with open_appliance(drives, control=Control()) as appliance:
        found = []
        for known in (SOLE_DISK, None):
            found.append(mount_guest(appliance, wanted=None, readonly=True, disk=known).mountpoints)
            appliance.unmount()
    assert found == [{"/": "btrfsvol:/dev/sda2/@"}] * 2


def build(name: str, folder: Path) -> Path:
    """Return the disk of a case; at the end of its script the btrfs is mounted."""
    script = f"{MAKE}{CASES[name].script}\nmount ${{A}}2 /sysroot\n"
    stack = Stack(script=script, sizes_mb=(SIZE_MB,), files={"/boot": None})
    (disk,) = build_stack(folder, stack)
    return disk


def holders(disk: Path) -> list[str]:
    """Return the subvolumes that have an agent."""
    script = (
        "mount -o ro,subvolid=5 /dev/sda2 /sysroot; cd /sysroot; "
        f"ls -d {AGENT} */{AGENT} */*/{AGENT} 2>/dev/null || :; cd /; umount /sysroot"
    )
    found = look([disk], script).split()
    return [path.removesuffix(AGENT).rstrip("/") for path in found]
