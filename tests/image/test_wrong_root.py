"""Disks where the root that can be read may not be the one that boots."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.composed import MB, Part, compose_disk, ext4
from tests.trees import OS_RELEASE, SYSTEMD_TREE, elf
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.errors import (
    InspectionError,
    SeveralOperatingSystemsError,
    UnsupportedGuestError,
    VmprovisionError,
)
from vmprovision.progress import Control
from vmprovision.reports import ImageOptions

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.appliance

LUKS_UUID = "6c75736b-0000-4000-8000-000000000001"
LUKS = ("cryptsetup", "luksFormat", "--batch-mode", "--type", "luks1", "--uuid", LUKS_UUID)
FAST = ("--pbkdf-force-iterations=1000", "--key-file", "/etc/hostname")
UNKNOWN_FEATURE = {1024 + 99: b"\x40"}  # the highest bit but one of those that are needed
# uberblocks of a pool's first label, by which blkid(8) knows ZFS
ZFS = {(128 << 10) + number * 1024: b"\x0c\xb1\xba\0\0\0\0\0" for number in range(8)}
USR_UUID = "0f0e0d0c-0b0a-4908-8706-050403020100"


def rescue(**files: str) -> Part:
    """Return a small system that can be read."""
    named = {"/" + name.replace("__", "/"): text for name, text in files.items()}
    return ext4(files={**SYSTEMD_TREE, **named})


def newer() -> Part:
    """Return the main system, on a filesystem with a feature that no kernel has."""
    whole = ext4("", "-O", "^metadata_csum", "-U", USR_UUID, files={"/etc/os-release": OS_RELEASE})
    return Part(line="", maker=whole.maker, files=whole.files, patch=UNKNOWN_FEATURE, size_mb=16)


def encrypted() -> Part:
    """Return a partition of LUKS."""
    return Part(line="", maker=(*LUKS, *FAST))


def pool() -> Part:
    """Return a partition of ZFS."""
    return Part(line="", maker=("true",), patch=ZFS, size_mb=64)


def damaged_btrfs() -> Part:
    """Return a btrfs of which only the superblock is left."""
    return Part(line="", maker=("mkfs.btrfs", "-q"), size_mb=120, patch={1 * MB: bytes(63 * MB)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A disk and its outcome: what the refusal says; nothing where the root is known."""

    parts: tuple[Part, ...]
    error: type[VmprovisionError] | None = None
    says: tuple[str, ...] = ()
    slow: bool = True


CASES = {
    "newer": Case(
        parts=(newer(), rescue()),
        error=SeveralOperatingSystemsError,
        says=("/dev/sda1 (ext4", "/dev/sda2", "--root /dev/sda2", "feature"),
        slow=False,
    ),
    "encrypted": Case(
        parts=(encrypted(), rescue()),
        error=SeveralOperatingSystemsError,
        says=("/dev/sda1 (crypto_LUKS", "/dev/sda2", "--root /dev/sda2"),
    ),
    "pool": Case(
        parts=(pool(), rescue()),
        error=SeveralOperatingSystemsError,
        says=("/dev/sda1 (zfs_member", "/dev/sda2"),
    ),
    "encrypted-home": Case(
        parts=(
            encrypted(),
            rescue(
                etc__crypttab=f"home UUID={LUKS_UUID} none luks\n",
                etc__fstab="/dev/mapper/home /home ext4 defaults 0 2\n",
            ),
        ),
        slow=False,
    ),
    "encrypted-root": Case(
        parts=(
            encrypted(),
            rescue(
                etc__crypttab=f"root UUID={LUKS_UUID} none luks\n",
                etc__fstab="/dev/mapper/root / ext4 defaults 0 1\n",
            ),
        ),
        error=SeveralOperatingSystemsError,
        says=("crypto_LUKS",),
    ),
    "damaged-data": Case(
        parts=(newer(), rescue(etc__fstab=f"UUID={USR_UUID} /srv ext4 defaults 0 2\n"))
    ),
    "only-newer": Case(
        parts=(newer(),), error=InspectionError, says=("/dev/sda1 (ext4", "feature", "kernel")
    ),
    "only-damaged-btrfs": Case(
        parts=(damaged_btrfs(),),
        error=InspectionError,
        says=("/dev/sda1 (btrfs: it cannot be mounted", "fsck"),
        slow=False,
    ),
    "damaged-btrfs": Case(
        parts=(damaged_btrfs(), rescue()),
        error=SeveralOperatingSystemsError,
        says=("/dev/sda1 (btrfs: it cannot be mounted", "--root /dev/sda2"),
    ),
    "only-encrypted": Case(
        parts=(encrypted(),), error=UnsupportedGuestError, says=("/dev/sda1", "encrypted")
    ),
    "usr-of-its-own": Case(
        parts=(
            rescue(etc__fstab=f"UUID={USR_UUID} /usr ext4 defaults 0 2\n"),
            ext4(
                "",
                "-U",
                USR_UUID,
                files={
                    **{
                        name.removeprefix("/usr"): what
                        for name, what in SYSTEMD_TREE.items()
                        if name.startswith("/usr/")
                    },
                    "/bin/sh": elf(),
                    "/etc/xdg": None,
                },
            ),
        )
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if case.slow else name
        for name, case in CASES.items()
    ],
)
def test_only_a_root_without_a_doubt_is_taken(name: str, tmp_path: Path) -> None:
    """An unreadable device beside the root is named, unless the root names it as its data."""
    case = CASES[name]
    image = compose_disk(tmp_path / "disk.raw", "label: gpt", case.parts)
    if case.error is None:
        assert vmprovision.inspect(image).init.system == "systemd"
        return
    with pytest.raises(case.error) as refusal:
        vmprovision.inspect(image)
    assert all(word in f"{refusal.value}" for word in case.says), str(refusal.value)


def test_the_caller_knows_the_root(tmp_path: Path) -> None:
    """With --root the doubt is settled."""
    image = compose_disk(tmp_path / "disk.raw", "label: gpt", [pool(), rescue()])
    guest = vmprovision.inspect(image, source=ImageOptions(root="/dev/sda2"))
    assert guest.mountpoints == {"/": "/dev/sda2"}


@pytest.mark.slow
def test_a_group_with_a_missing_disk(tmp_path: Path) -> None:
    """A volume group over two disks, of which one is here, beside a system that can be read."""
    parts = [Part(line="", size_mb=16), rescue()]
    image = compose_disk(tmp_path / "disk.raw", "label: gpt", parts)
    other = tmp_path / "other.raw"
    subprocess.run(["truncate", "-s", str(16 * MB), other], check=True)
    drives = [Drive(path=path, format="raw") for path in (image, other)]
    with open_appliance(drives, control=Control()) as appliance:
        appliance.activate_volumes()
        appliance.call("pvcreate", "/dev/sda1")
        appliance.call("pvcreate", "/dev/sdb")
        appliance.call("vgcreate", "main-vg", ["/dev/sda1", "/dev/sdb"])
        appliance.call("lvcreate", "root", "main-vg", 20)
    with pytest.raises(SeveralOperatingSystemsError, match="main-vg") as refusal:
        vmprovision.inspect(image)
    assert "/dev/sda2" in refusal.value.message


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a system"])
def test_a_group_with_damaged_metadata(tmp_path: Path, *, beside: bool) -> None:
    """LVM complains at length, and nothing waits for somebody who reads that."""
    parts = [Part(line="", size_mb=16), *([rescue()] if beside else [])]
    image = compose_disk(tmp_path / "disk.raw", "label: gpt", parts)
    with open_appliance([Drive(path=image, format="raw")], control=Control()) as appliance:
        appliance.activate_volumes()
        appliance.call("pvcreate", "/dev/sda1")
        appliance.call("vgcreate", "main-vg", ["/dev/sda1"])
        appliance.call("lvcreate", "root", "main-vg", 8)
        start = int(appliance.call("part_list", "/dev/sda")[0]["part_start"])
    content = bytearray(image.read_bytes())
    area = slice(start, start + (1 << 20))
    content[area] = content[area].replace(b"physical_volumes", b"physical_v\xfflumes")
    image.write_bytes(content)
    with pytest.raises(SeveralOperatingSystemsError if beside else InspectionError) as refusal:
        vmprovision.inspect(image)
    assert "/dev/sda1 (LVM2_member: " in refusal.value.message
    assert "checksum" in refusal.value.message
    assert refusal.value.message.count("/dev/sda2") == beside
