"""What an injection costs on guests that lie otherwise than on one plain partition.

``nox -s bench`` runs ``vmprovision inject`` on every layout in turn, several times over,
each on a fresh copy, with virt-customize beside it, and writes medians and ratios into
``docs/performance.md``.  The guests are small trees, as installers lay them out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tests.bench.edit import edit_for
from tests.bench.measure import Cost, become_subreaper, measure
from tests.bench.page import describe_machine, write_between
from tests.bench.ways import BASELINE, Case, guestfs_environment, virt_customize
from tests.image.stacks import Stack, build_stack
from vmprovision.host.cache import cache_directory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROUNDS = 5
PLAIN = "plain"
MANY = "61 partitions, a root on the last"  # virt-customize took more than six minutes
BEGIN, END = "<!-- bench: layouts -->", "<!-- /bench: layouts -->"
NOTHING_BOOTABLE = 31  # the exit code of docs/exit-codes.md
REFUSED = re.compile("refused")
UUID = "5b1a3c0e-0d3f-4c57-9a52-6f1d7d9a12f"  # and one digit more
BIOS_BOOT = "size=1MiB,type=21686148-6449-6E6F-744E-656564454649"


def parted(*lines: str) -> str:
    """Return the script that makes a partition table by sfdisk(8)."""
    return "sfdisk -q $A <<'X'\n" + "\n".join(lines) + "\nX\nudevadm settle\n"


def mounted(device: str, *places: str) -> str:
    """Return the script that mounts a device as the guest's root, and makes directories in it."""
    made = "".join(f"mkdir -p /sysroot{place}\n" for place in places)
    return f"mount {device} /sysroot\n{made}"


def fstab(*lines: str) -> str:
    """Return the script that unpacks the guest, with this fstab."""
    return "guest <<'X'\n" + "\n".join(lines) + "\nX\n"


SUSE_SUBVOLUMES = ("var", "home", "root", "opt", "srv", "usr/local", ".snapshots")
LAYOUTS: Mapping[str, Stack] = {
    PLAIN: Stack(
        sizes_mb=(128,),
        script=parted("label: gpt", BIOS_BOOT, "type=L")
        + f"mkfs.ext4 -q -U {UUID}1 ${{A}}2\n"
        + mounted("${A}2")
        + fstab(f"UUID={UUID}1 / ext4 defaults 0 1"),
    ),
    "Ubuntu Server: LVM, /boot": Stack(
        sizes_mb=(300,),
        script=parted("label: gpt", BIOS_BOOT, "size=60MiB", "type=L")
        + f"mkfs.ext4 -q -U {UUID}1 ${{A}}2\n"
        "lvm vgcreate -q ubuntu-vg ${A}3\nlvm lvcreate -q -y -n ubuntu-lv -L 120M ubuntu-vg\n"
        "mkfs.ext4 -q /dev/ubuntu-vg/ubuntu-lv\n"
        + mounted("/dev/ubuntu-vg/ubuntu-lv", "/boot")
        + "mount ${A}2 /sysroot/boot\nmkdir /sysroot/boot/grub\n"
        + fstab(
            "/dev/mapper/ubuntu--vg-ubuntu--lv / ext4 defaults 0 1",
            f"/dev/disk/by-uuid/{UUID}1 /boot ext4 defaults 0 1",
        ),
    ),
    "RHEL: LVM with XFS, /boot, /var, /home": Stack(
        sizes_mb=(1450,),
        script=parted("label: dos", "size=300MiB,type=83,bootable", "type=8e")
        + f"mkfs.xfs -q -m uuid={UUID}1 ${{A}}1\nlvm vgcreate -q rhel ${{A}}2\n"
        "for each in swap:32 root:300 var:400 home:304; do\n"
        "    lvm lvcreate -q -y -n ${each%:*} -L ${each#*:}M rhel\ndone\n"
        "mkswap /dev/rhel/swap\nfor each in root var home; do mkfs.xfs -q /dev/rhel/$each; done\n"
        + mounted("/dev/rhel/root", "/boot", "/var", "/home")
        + "mount ${A}1 /sysroot/boot\nmount /dev/rhel/var /sysroot/var\n"
        "mkdir /sysroot/var/log /sysroot/boot/grub2\n"
        + fstab(
            "/dev/mapper/rhel-root / xfs defaults 0 0",
            f"UUID={UUID}1 /boot xfs defaults 0 0",
            "/dev/mapper/rhel-var /var xfs defaults 0 0",
            "/dev/mapper/rhel-home /home xfs defaults 0 0",
            "/dev/mapper/rhel-swap none swap defaults 0 0",
        ),
    ),
    "Fedora: btrfs subvolumes, /boot": Stack(
        sizes_mb=(300,),
        script=parted("label: gpt", "size=16MiB,type=U", "size=40MiB", "type=L")
        + f"mkfs.vfat -n EFI ${{A}}1\nmkfs.ext4 -q -U {UUID}1 ${{A}}2\n"
        f"mkfs.btrfs -q -L fedora -U {UUID}2 ${{A}}3\nmount ${{A}}3 /sysroot\n"
        "for each in root home var; do btrfs -q subvolume create /sysroot/$each; done\n"
        "umount /sysroot\n"
        + mounted("-o subvol=root ${A}3", "/boot", "/home", "/var")
        + "mount ${A}2 /sysroot/boot\nmount -o subvol=var ${A}3 /sysroot/var\n"
        "mkdir /sysroot/boot/grub2\n"
        + fstab(
            f"UUID={UUID}2 / btrfs subvol=root,compress=zstd:1 0 0",
            f"UUID={UUID}1 /boot ext4 defaults 1 2",
            f"UUID={UUID}2 /home btrfs subvol=home 0 0",
            f"UUID={UUID}2 /var btrfs subvol=var 0 0",
        ),
    ),
    "openSUSE: btrfs, a snapshot as default": Stack(
        sizes_mb=(256,),
        script=parted("label: gpt", BIOS_BOOT, "type=L")
        + f"mkfs.btrfs -q -U {UUID}2 ${{A}}2\nmount ${{A}}2 /sysroot\ncd /sysroot\n"
        "btrfs -q subvolume create @\nmkdir @/usr\n"
        f"for each in {' '.join(SUSE_SUBVOLUMES)}; do btrfs -q subvolume create @/$each; done\n"
        "mkdir @/.snapshots/1\nbtrfs -q subvolume create @/.snapshots/1/snapshot\n"
        "btrfs subvolume set-default @/.snapshots/1/snapshot\ncd /\numount /sysroot\n"
        + mounted("${A}2", *(f"/{each}" for each in SUSE_SUBVOLUMES))
        + "mount -o subvol=@/var ${A}2 /sysroot/var\n"
        "mount -o subvol=@/usr/local ${A}2 /sysroot/usr/local\n"
        + fstab(
            f"UUID={UUID}2 / btrfs defaults 0 0",
            *(f"UUID={UUID}2 /{each} btrfs subvol=/@/{each} 0 0" for each in SUSE_SUBVOLUMES),
        ),
    ),
    "/boot, /usr, /var and /home of their own": Stack(
        sizes_mb=(256,),
        script=parted("label: gpt", *(f"size={size}MiB" for size in (30, 60, 60, 60, 40)))
        + f"for each in 1 2 3 4 5; do mkfs.ext4 -q -U {UUID}$each $A$each; done\n"
        + mounted("${A}2", "/boot", "/usr", "/var", "/home")
        + "mount ${A}1 /sysroot/boot\nmount ${A}3 /sysroot/usr\nmount ${A}4 /sysroot/var\n"
        "mkdir /sysroot/boot/grub /sysroot/usr/share /sysroot/var/log\n"
        + fstab(
            *(
                f"UUID={UUID}{number} {place} ext4 defaults 0 1"
                for number, place in enumerate(("/boot", "/", "/usr", "/var", "/home"), 1)
            )
        ),
    ),
    "a logical partition, /boot": Stack(
        sizes_mb=(160,),
        script=parted("label: dos", "size=30MiB,type=83", "type=5", "size=20MiB,type=82", "type=83")
        + f"mkfs.ext4 -q -U {UUID}1 ${{A}}1\nmkswap ${{A}}5\nmkfs.ext4 -q -U {UUID}6 ${{A}}6\n"
        + mounted("${A}6", "/boot")
        + "mount ${A}1 /sysroot/boot\nmkdir /sysroot/boot/grub\n"
        + fstab(
            f"UUID={UUID}6 / ext4 defaults 0 1",
            f"UUID={UUID}1 /boot ext4 defaults 0 1",
            "/dev/sda5 none swap sw 0 0",
        ),
    ),
    MANY: Stack(
        sizes_mb=(320,),
        script=parted("label: gpt", *["size=3MiB"] * 60, "type=L")
        + "for each in $(seq 1 60); do mkfs.ext4 -q $A$each; done\n"
        + f"mkfs.ext4 -q -U {UUID}1 ${{A}}61\n"
        + mounted("${A}61")
        + fstab(f"UUID={UUID}1 / ext4 defaults 0 1"),
    ),
    "nothing bootable (refused)": Stack(
        sizes_mb=(128,),
        script=parted("label: gpt", "size=30MiB", "size=30MiB", "type=L")
        + "for each in 1 2 3; do mkfs.ext4 -q $A$each; done\nmkfs.ext4 -q -F ${A}2\n"
        + mounted("${A}2", "/photos"),
    ),
    "an empty partition table (refused)": Stack(
        script=parted("label: gpt") + "mount -t tmpfs none /sysroot\n"
    ),
}


def layout_disk(name: str) -> Path:
    """Return the disk of a layout, from the cache or made now."""
    stack = LAYOUTS[name]
    key = hashlib.sha256(repr(stack).encode()).hexdigest()[:16]
    disk = cache_directory() / "tests" / f"layout-{key}.raw"
    if not disk.exists():
        disk.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=disk.parent) as folder:
            (made,) = build_stack(Path(folder), stack)
            made.rename(disk)
    return disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The cost of one layout in each round: of vmprovision, and of virt-customize if possible."""

    ours: list[Cost] = field(default_factory=list)
    others: list[Cost] = field(default_factory=list)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="a regular expression that names layouts")
    parser.add_argument("--dry", action="store_true", help="leave docs/performance.md as it is")
    asked = parser.parse_args(arguments)
    names = [name for name in LAYOUTS if name == PLAIN or re.search(asked.only, name)]
    costs = {name: Costs() for name in names}
    become_subreaper()
    for number in range(asked.rounds):
        for name, measured in costs.items():
            measured.ours.append(injection_of(name))
            if has_baseline(name):
                measured.others.append(virt_customize_of(name))
            sys.stdout.write(f"round {number + 1}: {name}: {measured}\n")
            sys.stdout.flush()
    table = render_table(costs)
    sys.stdout.write(table + "\n")
    if not asked.dry:
        write_between(BEGIN, END, f"{describe_machine(asked.rounds)}\n\n{table}")
    return 0


def has_baseline(name: str) -> bool:
    """Return whether virt-customize is here, and can make an edit within a minute or two."""
    is_excluded = REFUSED.search(name) or name == MANY
    return not is_excluded and shutil.which(BASELINE) is not None


@contextlib.contextmanager
def fresh_copy(name: str) -> Iterator[Path]:
    """Give a copy of a layout's disk, alone in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "disk.raw"
        subprocess.run(["cp", "--sparse=always", layout_disk(name), image], check=True)
        yield image


def injection_of(name: str) -> Cost:
    """Return what it costs to inject into a fresh copy of a layout's disk."""
    with fresh_copy(name) as image:
        words = [sys.executable, "-m", "vmprovision", "inject", "--format", "raw", str(image)]
        script = 'shift; "$@"; [ $? = "$0" ]'
        code = NOTHING_BOOTABLE if REFUSED.search(name) else 0
        return measure(["sh", "-c", script, str(code), "-", *words], env={}, phased=False)


def virt_customize_of(name: str) -> Cost:
    """Return what it costs virt-customize to make the same edit."""
    with fresh_copy(name) as image, tempfile.TemporaryDirectory() as folder:
        edit = edit_for(image, Path(folder), disk_format="raw")
        case = Case(images=(image,), edit=edit, folder=Path(folder))
        return measure(virt_customize(case), env=guestfs_environment(), phased=False)


def render_table(costs: Mapping[str, Costs]) -> str:
    """Return the medians in Markdown."""
    plain = _medians(costs[PLAIN].ours)
    lines = [
        f"| layout | wall s | CPU s | of plain, wall | CPU | {BASELINE}, s | faster | less CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in costs.items():
        wall, cpu = _medians(each.ours)
        cells = [f"{wall:.2f}", f"{cpu:.2f}", f"{wall / plain[0]:.2f}", f"{cpu / plain[1]:.2f}"]
        if each.others:
            other_wall, other_cpu = _medians(each.others)
            cells.append(f"{other_wall:.2f}")
            cells += [f"{other_wall / wall:.1f} times", f"{other_cpu / cpu:.1f} times"]
        else:
            cells += ["", "", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _medians(costs: Sequence[Cost]) -> tuple[float, float]:
    """Return the medians of wall and CPU seconds."""
    return median(cost.wall for cost in costs), median(cost.cpu for cost in costs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
