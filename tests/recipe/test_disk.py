"""The disks of cloud images, laid out in an appliance without a guest on them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from vmprovision.appliance.session import Drive, launch
from vmprovision.progress import Control
from vmprovision.recipe import find_recipe
from vmprovision.recipe.disk import BIOS_BOOT, EFI_SYSTEM, mount_new_filesystems

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.appliance, pytest.mark.slow]


@pytest.mark.parametrize("name", ["ext4", "xfs", "btrfs", "lvm"])
def test_a_cloud_disk_is_mounted_as_its_fstab_says(name: str, tmp_path: Path) -> None:
    """The partitions have the types that firmware looks for, and the names in fstab are right."""
    recipe = find_recipe(f"debian-13-cloud-{name}")
    lines = recipe.files()["etc/fstab"].read_text(encoding="utf-8").splitlines()
    fstab = {line.split()[1]: line.split() for line in lines}
    disk = tmp_path / "disk.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", str(disk), f"{recipe.disk.size_mb}M"]
    subprocess.run(create, check=True)
    with launch([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        mount_new_filesystems(appliance, recipe.disk)
        assert set(appliance.call("mountpoints").values()) <= set(fstab)
        for place in fstab:
            appliance.call("mkdir_p", f"{place}/here".replace("//", "/"))
        assert appliance.call("part_get_gpt_type", "/dev/sda", 1) == BIOS_BOOT
        assert appliance.call("part_get_gpt_type", "/dev/sda", 2) == EFI_SYSTEM
        found = {
            line[0]: appliance.call("findfs_uuid", line[0].removeprefix("UUID="))
            if line[0].startswith("UUID=")
            else appliance.call("findfs_label", line[0].removeprefix("LABEL="))
            for line in fstab.values()
            if "=" in line[0]
        }
        for line in fstab.values():
            group = recipe.disk.volume_group
            device = found.get(line[0], f"/dev/{group}/root")
            assert appliance.call("vfs_type", device) == line[2]
        appliance.call("umount_all")
