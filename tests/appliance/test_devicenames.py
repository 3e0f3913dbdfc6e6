"""Which device a guest means by a name in its fstab."""

from __future__ import annotations

import pytest

from vmprovision.appliance.devicenames import LVM_UUID, DeviceNames

TAGS = {
    ("/dev/sda1", "UUID"): "1111-AAAA",
    ("/dev/sda2", "UUID"): "0f0e0d0c-0b0a-4908-8706-050403020100",
    ("/dev/sda2", "LABEL"): "x y",
    ("/dev/sda2", "PART_ENTRY_UUID"): "aabbccdd-02",
    ("/dev/sda3", "PART_ENTRY_NAME"): "x y",
    ("/dev/sda3", "LABEL"): "Upper",
    ("/dev/guest-vg/var", LVM_UUID): "a1B2" * 16,
}
DEVICES = ("/dev/sda1", "/dev/sda2", "/dev/sda3", "/dev/guest-vg/var", "/dev/md127")
PATH = "/dev/disk/by-path/pci-0000:00:10.0-scsi-0:0:0:0"


def names(*known: tuple[str, str]) -> DeviceNames:
    """The devices of a disk, with what the guest's own root line told."""
    found = DeviceNames(DEVICES, lambda *asked: TAGS.get(asked, ""))
    for name, device in known:
        found.learn(name, device)
    return found


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("UUID=0F0E0D0C-0b0a-4908-8706-050403020100", "/dev/sda2"),
        ('UUID="1111-aaaa"', "/dev/sda1"),
        ("/dev/disk/by-uuid/1111-AAAA", "/dev/sda1"),
        ("LABEL=x y", "/dev/sda2"),
        ("/dev/disk/by-label/x\\x20y", "/dev/sda2"),
        ("LABEL=upper", None),
        ("PARTUUID=AABBCCDD-02", "/dev/sda2"),
        ("/dev/disk/by-partlabel/x\\x20y", "/dev/sda3"),
        ("PARTLABEL=z", None),
        ("/dev/mapper/guest--vg-var", "/dev/guest-vg/var"),
        ("/dev/guest-vg/var", "/dev/guest-vg/var"),
        ("/dev/disk/by-id/dm-name-guest--vg-var", "/dev/guest-vg/var"),
        ("/dev/disk/by-id/dm-uuid-LVM-" + "a1B2" * 16, "/dev/guest-vg/var"),
        ("/dev/disk/by-id/dm-uuid-LVM-" + "a1B2" * 15 + "XXXX", None),
        ("/dev/md127", "/dev/md127"),
        ("/dev/sda2", "/dev/sda2"),
        ("/dev/vda2", "/dev/sda2"),
        ("/dev/nvme0n1p2", "/dev/sda2"),
        ("/dev/mmcblk0p3", "/dev/sda3"),
        ("/dev/vdb2", None),
        ("/dev/sda9", None),
        ("/dev/sda", None),
        (f"{PATH}-part2", None),
        ("nas:/x", None),
    ],
)
def test_names_that_say_it_by_themselves(name: str, device: str | None) -> None:
    """Tags, volumes and the first disk; a name that may be another disk's is not guessed."""
    assert names().find(name) == device


@pytest.mark.parametrize(
    ("root", "name", "device"),
    [
        ("/dev/vdb1", "/dev/vdb2", "/dev/sda2"),
        ("/dev/vdb1", "/dev/vda2", None),
        ("/dev/vdb1", "/dev/sda2", None),
        ("/dev/vda3", "/dev/vdb2", None),
        (f"{PATH}-part1", f"{PATH}-part2", "/dev/sda2"),
        (f"{PATH}-part2", f"{PATH}-part1", None),
        (f"{PATH}-part1", "/dev/vda2", "/dev/sda2"),
        (f"{PATH}-part1", "/dev/disk/by-path/pci-0000:00:1f.2-ata-1-part2", None),
        ("/dev/disk/by-id/ata-A_B-part1", "ID=ata-A_B-part3", "/dev/sda3"),
        ("/dev/nvme1n1p1", "/dev/nvme1n1p2", "/dev/sda2"),
        ("UUID=1", "/dev/vda2", "/dev/sda2"),
    ],
)
def test_the_roots_own_line_tells_the_disk(root: str, name: str, device: str | None) -> None:
    """The root is the first partition here; a line that says otherwise tells nothing."""
    assert names((root, "/dev/sda1")).find(name) == device


def test_guesses() -> None:
    """Where the disk is not known, its partition of that number might be meant."""
    assert names().guesses(f"{PATH}-part2") == ["/dev/sda2"]
    assert names().guesses("/dev/vdb7") == []
    assert names((f"{PATH}-part1", "/dev/sda1")).guesses(f"{PATH}-part2") == ()
