"""Cloud images as distributions make them; the matrix boots them by their own GRUB."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.trees import Mount, Sight, look_into

from .test_machine import overlay, recipe_image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = [pytest.mark.appliance, pytest.mark.slow]

IMAGE = vmprovision.ImageOptions(format="qcow2", allow_backing=True)
ESP = Mount(device="2", at="/boot/efi")
BOOT = Mount(device="3", at="/boot")
# recipe -> its filesystems
GUESTS: dict[str, Sequence[Mount]] = {
    "ext4": [Mount(device="3"), ESP],
    "xfs": [Mount(device="4"), BOOT, ESP],
    "lvm": [Mount(device="/dev/vg0/root"), BOOT, ESP],
    "btrfs": [
        Mount(device="3", options="subvol=@"),
        *(
            Mount(device="3", at=place, options=f"subvol=@{place}")
            for place in ("/home", "/usr/local", "/var")
        ),
        ESP,
    ],
}


@pytest.mark.parametrize("name", GUESTS)
def test_remove_brings_a_cloud_image_back(name: str, tmp_path: Path) -> None:
    """Whatever its filesystems are, the image holds the same files, labels and modes as before."""
    disk = overlay(recipe_image(f"debian-13-cloud-{name}"), tmp_path / "image.qcow2")
    sight = Sight(path=disk, format="qcow2", mounts=GUESTS[name])
    before = look_into(sight, tmp_path)
    guest = vmprovision.inject(disk, source=IMAGE).guest
    assert (guest.init.system, guest.init.confidence) == ("systemd", "certain")
    assert [each.program for each in guest.first_boot] == ["cloud-init"]
    vmprovision.remove(disk, source=IMAGE)
    assert look_into(sight, tmp_path) == before
