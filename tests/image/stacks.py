"""Guests whose filesystems lie on something else than a partition, on one disk or several.

A shell script in an appliance makes each with the real tools: cryptsetup, LVM, mdadm.
"""

from __future__ import annotations

import os
import string
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.trees import SYSTEMD_TREE, make_tree
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.progress import Control

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.trees import Content

MB = 1 << 20
TREE = "/tmp/tree.tar"  # noqa: S108 -- the appliance's own
# The least that cryptsetup takes, as deriving a key is slow without KVM.
FORMAT = "cryptsetup -q luksFormat --pbkdf pbkdf2 --pbkdf-force-iterations 1000"
PRELUDE = f"""
set -e
luks() {{ # TYPE DEVICE KEY NAME
    printf "$3" >/run/key
    {FORMAT} --type $1 $2 /run/key
    cryptsetup open --key-file /run/key $2 $4
    rm /run/key
}}
guest() {{ # unpack it into what is mounted, with this fstab
    tar -C /sysroot -xf {TREE}
    cat >/sysroot/etc/fstab
}}
"""
EPILOGUE = """
umount -R /sysroot
for round in 1 2 3; do
    lvm vgchange -an >/dev/null 2>&1 || :
    for mapped in /dev/mapper/made*; do cryptsetup close $mapped 2>/dev/null || :; done
done
for array in /dev/md?*; do [ ! -b $array ] || mdadm -q --stop $array; done
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A guest's disks.

    Attributes:
        script: makes them; ``$A``, ``$B`` and so on are the disks, ``/sysroot`` is the guest.
        sizes_mb: of each disk.
    """

    script: str
    sizes_mb: tuple[int, ...] = (48,)
    files: Mapping[str, Content] | None = None


def build_stack(folder: Path, stack: Stack) -> list[Path]:
    """Return the raw disks of a stack, in a folder that is there."""
    letters = string.ascii_lowercase[: len(stack.sizes_mb)]
    disks = [folder / f"disk{letter}.raw" for letter in letters]
    for disk, size in zip(disks, stack.sizes_mb, strict=True):
        disk.touch()
        os.truncate(disk, size * MB)
    variables = " ".join(f"{letter.upper()}=/dev/sd{letter}" for letter in letters)
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_appliance(
            [Drive(path=disk, format="raw") for disk in disks], control=Control()
        ) as appliance,
    ):
        appliance.activate_volumes()
        tree = make_tree(Path(scratch) / "tree", {**SYSTEMD_TREE, **(stack.files or {})})
        archive = Path(scratch) / "tree.tar"
        subprocess.run(
            ["tar", "-C", tree, "--owner=0", "--group=0", "-cf", archive, "."], check=True
        )
        appliance.call("debug_upload", str(archive), TREE, 0o600)
        appliance.call("debug", "sh", [f"{variables}\n{PRELUDE}{stack.script}{EPILOGUE}"])
    return disks


def look(disks: list[Path], script: str) -> str:
    """Return what a script prints that looks at the disks and can change none."""
    drives = [Drive(path=disk, format="raw", readonly=True) for disk in disks]
    with open_appliance(drives, control=Control()) as appliance:
        appliance.activate_volumes()
        return str(appliance.call("debug", "sh", [script]))
