"""A guest whose root is a read-only snapshot boots the snapshot that an injection made."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.trees import Mount, Sight, differences, look_into
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.progress import Control

from .test_machine import recipe_image

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

SECONDS = 900.0
COPY_SECONDS = 600.0
RAW = vmprovision.ImageOptions(format="raw")
SIZE = 2 << 30
UUID = "5b1a3c0e-0d3f-4c57-9a52-6f1d7d9a1306"
# Debian's tree (the second disk), laid out as openSUSE MicroOS is.
LAY_OUT = f"""
set -e
echo 'label: gpt
type=L' | sfdisk -q /dev/sda
udevadm settle
mkfs.btrfs -q -U {UUID} /dev/sda1
mkdir /run/old
mount -o ro /dev/sdb1 /run/old
mount /dev/sda1 /sysroot
cd /sysroot
btrfs -q subvolume create @
mkdir @/usr
for each in home root usr/local var .snapshots; do btrfs -q subvolume create @/$each; done
mkdir @/.snapshots/1
btrfs -q subvolume create @/.snapshots/1/snapshot
btrfs subvolume set-default @/.snapshots/1/snapshot
cd /
umount /sysroot
mount /dev/sda1 /sysroot
echo 'UUID={UUID} / btrfs ro 0 0' >/run/fstab
echo 'tmpfs /tmp tmpfs defaults 0 0' >>/run/fstab
for each in home root usr/local var .snapshots; do
    mkdir -p /sysroot/$each
    mount -o subvol=@/$each /dev/sda1 /sysroot/$each
    echo "UUID={UUID} /$each btrfs subvol=/@/$each 0 0" >>/run/fstab
done
cp -a /run/old/. /sysroot/
cp /run/fstab /sysroot/etc/fstab
umount -R /sysroot /run/old
mount -o subvolid=5 /dev/sda1 /sysroot
btrfs property set -ts /sysroot/@/.snapshots/1/snapshot ro true
umount /sysroot
"""


def test_the_new_snapshot_boots_and_goes(tmp_path: Path) -> None:
    """The agent, whose service is only in the new snapshot, answers; the old one is unchanged."""
    disk = tmp_path / "disk.raw"
    disk.touch()
    os.truncate(disk, SIZE)
    debian = Drive(path=recipe_image("debian-12-systemd"), format="qcow2", readonly=True)
    drives = [Drive(path=disk, format="raw"), debian]
    with open_appliance(drives, control=Control()) as appliance:
        appliance.activate_volumes()
        appliance.call("debug", "sh", [LAY_OUT], limit=COPY_SECONDS)
    old = Sight(path=disk, format="raw", mounts=[Mount(device="1", options=subvolume(1))])
    before = look_into(old, tmp_path)

    vmprovision.inject(disk, vmprovision.InjectOptions(vm_id="web-1"), source=RAW)
    assert differences(before, look_into(old, tmp_path)) == {}
    proof = vmprovision.prove(disk, vmprovision.ProofOptions(timeout=SECONDS), source=RAW)
    assert proof.booted_by.startswith("own kernel")
    assert proof.information["vm_id"] == "web-1"
    assert proof.information["init"]["cgroup"] == "/system.slice/guest-agent.service"

    vmprovision.remove(disk, source=RAW)
    default = Sight(path=disk, format="raw", mounts=[Mount(device="1", options=subvolume(3))])
    assert differences(before, look_into(default, tmp_path)) == {}


def subvolume(number: int) -> str:
    """Return the option that mounts a snapshot."""
    return f"subvol=@/.snapshots/{number}/snapshot"
