"""Superblocks as the filesystems' own tools write them, against blkid's reading of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.image.composed import MB, run_tool
from vmprovision.disklayout.superblocks import START_SIZE, identify, identify_kind

if TYPE_CHECKING:
    from pathlib import Path

EXT4 = ("mke2fs", "-q", "-F", "-t", "ext4", "-L", "rootfs")
SWAP = ("mkswap", "-L", "sleep")
LUKS_FAST = ("--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--key-file", "/etc/hostname")


def made(folder: Path, *command: str, size_mb: int = 320) -> Path:
    """A file of this size, with what the command makes of it."""
    image = folder / "volume"
    with image.open("wb") as file:
        file.truncate(size_mb * MB)
    run_tool(*command, str(image))
    return image


def start_of(image: Path) -> bytes:
    """The first bytes of a volume."""
    with image.open("rb") as file:
        return file.read(START_SIZE)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (EXT4, "ext"),
        (("mke2fs", "-q", "-F", "-t", "ext2", "-b", "1024"), "ext"),
        (("mke2fs", "-q", "-F", "-t", "ext3", "-L", "sixteen-letters!"), "ext"),
        (("mke2fs", "-q", "-F", "-t", "ext4", "-O", "64bit", "-b", "4096"), "ext"),
        (("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^64bit", "-b", "1024"), "ext"),
        (("mkfs.xfs", "-q", "-L", "twelvelettrs"), "xfs"),
        (("mkfs.btrfs", "-q", "-L", "a-label-of-btrfs"), "btrfs"),
        (("mkfs.vfat", "-F", "32", "-n", "UEFI"), "vfat"),
        (("mkfs.vfat", "-F", "16"), "vfat"),
        (SWAP, "swap"),
    ],
)
def test_plain_filesystems_are_known_by_what_fstab_calls_them(
    command: tuple[str, ...], kind: str, tmp_path: Path
) -> None:
    """Kind, UUID and label are blkid's."""
    image = made(tmp_path, *command)
    lines = run_tool("blkid", "-p", "-o", "export", str(image)).splitlines()
    said = dict(line.partition("=")[::2] for line in lines)
    found = identify(start_of(image))
    assert found is not None
    assert found.kind == kind
    assert said["TYPE"].startswith(kind)
    assert found.uuid == said["UUID"]
    assert found.label == said.get("LABEL", "")
    if found.driver:
        assert found.driver == said["TYPE"]
        assert found.size == image.stat().st_size


def test_ntfs_is_known(tmp_path: Path) -> None:
    """Its tags are not read: Linux boots from none."""
    found = identify(start_of(made(tmp_path, "mkntfs", "-q", "-F")))
    assert found is not None
    assert found.kind == "ntfs"


@pytest.mark.parametrize(
    "command",
    [
        ("cryptsetup", "luksFormat", "--batch-mode", "--type", "luks1", "--key-file", "/dev/null"),
        ("mke2fs", "-q", "-F", "-O", "journal_dev"),
        ("true",),
    ],
    ids=["luks", "journal", "nothing"],
)
def test_others_are_unclear(command: tuple[str, ...], tmp_path: Path) -> None:
    """They are the appliance's own tools' affair."""
    if command[0] == "cryptsetup":
        (tmp_path / "key").write_text("secret")
        fast = ("--pbkdf-force-iterations=1000", "--key-file", str(tmp_path / "key"))
        command = (*command[:-2], *fast)
    assert identify(start_of(made(tmp_path, *command))) is None


@pytest.mark.parametrize(
    ("place", "signature"),
    [
        (512, b"LABELONE"),
        (4096, b"\xfc\x4e\x2b\xa9"),
        (0x10040, b"_BHRfS_M"),
        (4086, b"SWAPSPACE2"),
        (0, b"LUKS\xba\xbe"),
    ],
)
def test_two_signatures_are_unclear(place: int, signature: bytes, tmp_path: Path) -> None:
    """Something was made over something else, or hides in it."""
    start = bytearray(start_of(made(tmp_path, *EXT4)))
    assert identify(bytes(start)) is not None
    start[place : place + len(signature)] = signature
    assert identify(bytes(start)) is None


@pytest.mark.parametrize("page", [4096, 65536])
@pytest.mark.parametrize("signature", [b"S1SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001"])
def test_a_sleeping_swap_is_unclear(page: int, signature: bytes, tmp_path: Path) -> None:
    """A hibernated guest's memory is in it."""
    start = bytearray(start_of(made(tmp_path, *SWAP)))
    start[page - 10 : page] = signature
    assert identify(bytes(start)) is None


# how long it takes says more of the host than of the code
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=4096), st.sampled_from([0, 54, 512, 1024, 4086, 16384, 0x10048]))
def test_any_bytes_give_an_answer(noise: bytes, place: int) -> None:
    """Nothing is raised, however short the volume."""
    start = bytearray(START_SIZE)
    start[1080:1082] = b"\x53\xef"
    start[510:512] = b"\x55\xaa"
    start[0x10040:0x10048] = b"_BHRfS_M"
    start[place : place + len(noise)] = noise
    for size in (START_SIZE, 4100, 1100, 520, 10, 0):
        identify(bytes(start[:size]))


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (("true",), "unknown"),
        (("mkfs.btrfs", "-q"), "btrfs"),
        (
            ("cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", *LUKS_FAST),
            "crypto_LUKS",
        ),
        (("mkfs.vfat",), "vfat"),
        (SWAP, "swap"),
        (EXT4, "ext"),
    ],
)
def test_kinds_are_named_as_blkid_names_them(
    command: tuple[str, ...], kind: str | None, tmp_path: Path
) -> None:
    """Or not at all, where blkid is to be asked."""
    image = made(tmp_path, *command)
    assert identify_kind(start_of(image)) == kind


def test_two_kinds_at_once_are_for_blkid(tmp_path: Path) -> None:
    """Something was made over something else."""
    start = bytearray(start_of(made(tmp_path, *EXT4)))
    start[512:520] = b"LABELONE"
    assert identify_kind(bytes(start)) is None
    assert identify_kind(bytes(start[:1024]) + bytes(START_SIZE)) == "LVM2_member"
