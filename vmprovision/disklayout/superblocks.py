"""Recognise a filesystem by its first bytes, with the names of blkid(8).

``identify`` knows ext2 to ext4, XFS, btrfs, FAT, NTFS, exFAT and swap. It returns None
for LVM, LUKS, RAID and all others, for two signatures at once, and for the swap of a
hibernated system. The caller then uses the appliance's own tools, which also find
signatures at a partition's end.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import Literal

START_SIZE = 72 << 10  # the superblocks of btrfs and reiserfs are the last that are looked for
Kind = Literal["ext", "xfs", "btrfs", "vfat", "ntfs", "exfat", "swap"]

_PAGES = (4096, 8192, 16384, 32768, 65536)
_SLEEPING = (
    b"S1SUSPEND",
    b"S2SUSPEND",
    b"ULSUSPEND",
    b"LINHIB0001",
    b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c",
)
_SECTOR = 512
_EXT = 1024
_EXT_JOURNAL_DEVICE, _EXT_EXTENTS, _EXT_64BIT = 0x8, 0x40, 0x80
_LOG_LIMIT = 6  # log2 of the largest block size in kilobytes
_BTRFS = 0x10000

# (offset, signature, blkid(8)'s kind if the signature alone determines it) of partitions
# that need tools of their own.
_FOREIGN = (
    *((sector, b"LABELONE", "LVM2_member") for sector in range(0, 2048, 512)),
    (0, b"LUKS\xba\xbe", "crypto_LUKS"),
    # LUKS2's second header
    *((1 << shift, b"SKUL\xba\xbe", "crypto_LUKS") for shift in range(14, 17)),
    (3, b"-FVE-FS-", "BitLocker"),
    (0, b"\xfc\x4e\x2b\xa9", "linux_raid_member"),  # MD 1.1
    (0, b"\xa9\x2b\x4e\xfc", "linux_raid_member"),
    (4096, b"\xfc\x4e\x2b\xa9", "linux_raid_member"),  # MD 1.2
    (4096, b"\xa9\x2b\x4e\xfc", "linux_raid_member"),
    (4120, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"), "bcache"),
    (0x8001, b"CD001", ""),
    (0x8001, b"BEA01", ""),  # UDF
    (0x8001, b"NSR0", ""),
    (0, b"hsqs", ""),  # squashfs
    (0, b"sqsh", ""),
    (1024, b"\xe2\xe1\xf5\xe0", ""),  # erofs
    (1024, b"\x10\x20\xf5\xf2", ""),  # f2fs
    (0x8000, b"JFS1", ""),
    (0x10034, b"ReIsEr", ""),
    (0x2034, b"ReIsEr", ""),
    (1030, b"\x34\x34", ""),  # nilfs2
    (8192 + 1372, b"\x54\x19\x01\x00", ""),  # UFS
    (8192 + 1372, b"\x00\x01\x19\x54", ""),
    (65536 + 1372, b"\x19\x01\x54\x19", ""),  # UFS2
    (65536 + 1372, b"\x19\x54\x01\x19", ""),
)
_ZFS_LABEL = slice(16384, 16384 + 4096)  # holds its pool's version, first of all


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """A filesystem's superblock.

    Attributes:
        kind: blkid(8)'s name of the filesystem.
        uuid: as fstab(5) names it.
        label: as fstab(5) names it. For FAT it is the boot sector's label, which may be
            outdated.
        driver: the kernel's driver, if only one fits; empty if mount(8) is to choose.
        size: in bytes; 0 if it was not read.
        devices: the number of devices of the filesystem.
    """

    kind: Kind
    uuid: str = ""
    label: str = ""
    driver: str = ""
    size: int = 0
    devices: int = 1


def identify(start: bytes) -> Superblock | None:
    """Return the only filesystem or swap that begins with these bytes, or None if unclear."""
    if _foreign(start):
        return None
    if b"\0\0\0\7version\0" in start[_ZFS_LABEL]:
        return None
    if any(start[page - 10 :].startswith(_SLEEPING) for page in _PAGES):
        return None
    found = [block for parse in _PARSERS if (block := parse(start))]
    return found[0] if len(found) == 1 else None


def _foreign(start: bytes) -> set[str]:
    return {kind for place, magic, kind in _FOREIGN if start[place : place + len(magic)] == magic}


def identify_kind(start: bytes) -> str | None:
    """Return blkid(8)'s name of what begins with these bytes, or None if blkid must be run.

    ``unknown`` means no known content, ``ext`` any version of ext, ``swsuspend`` the
    memory image of a hibernated system.
    """
    if not any(start):
        return "unknown"
    foreign = _foreign(start)
    found = [block.kind for parse in _PARSERS if (block := parse(start))]
    if b"\0\0\0\7version\0" in start[_ZFS_LABEL]:
        return None
    if any(start[page - 10 :].startswith(_SLEEPING) for page in _PAGES):
        return None if foreign or found else "swsuspend"
    kinds = [*foreign, *found]
    return (kinds[0] or None) if len(kinds) == 1 else None


def _ext(start: bytes) -> Superblock | None:
    if start[_EXT + 56 : _EXT + 58] != b"\x53\xef" or len(start) < 2 * _EXT:
        return None
    (incompatible,) = struct.unpack_from("<I", start, _EXT + 96)
    if incompatible & _EXT_JOURNAL_DEVICE:
        return None
    (low,) = struct.unpack_from("<I", start, _EXT + 4)
    (log,) = struct.unpack_from("<I", start, _EXT + 24)
    (high,) = struct.unpack_from("<I", start, _EXT + 336) if incompatible & _EXT_64BIT else (0,)
    return Superblock(
        kind="ext",
        uuid=_uuid(start[_EXT + 104 :]),
        label=_text(start[_EXT + 120 : _EXT + 136]),
        driver="ext4" if incompatible & _EXT_EXTENTS else "",
        size=((high << 32) + low) * (1024 << log) if log <= _LOG_LIMIT else 0,
    )


def _xfs(start: bytes) -> Superblock | None:
    if start[:4] != b"XFSB" or len(start) < _SECTOR:
        return None
    length, blocks = struct.unpack_from(">IQ", start, 4)
    return Superblock(
        kind="xfs",
        uuid=_uuid(start[32:]),
        label=_text(start[108:120]),
        driver="xfs",
        size=length * blocks,
    )


def _btrfs(start: bytes) -> Superblock | None:
    if start[_BTRFS + 64 : _BTRFS + 72] != b"_BHRfS_M" or len(start) < _BTRFS + 4096:
        return None
    (devices,) = struct.unpack_from("<Q", start, _BTRFS + 136)
    (size,) = struct.unpack_from("<Q", start, _BTRFS + 209)  # the label of this device
    return Superblock(
        kind="btrfs",
        uuid=_uuid(start[_BTRFS + 32 :]),
        label=_text(start[_BTRFS + 299 : _BTRFS + 555]),
        driver="btrfs",
        size=size,
        devices=devices,
    )


def _vfat(start: bytes) -> Superblock | None:
    if start[510:512] != b"\x55\xaa":
        return None
    if start[82:90] == b"FAT32   ":
        serial, label = start[67:71], start[71:82]
    elif start[54:62] in (b"FAT12   ", b"FAT16   ", b"FAT     "):
        serial, label = start[39:43], start[43:54]
    else:
        return None
    digits = serial[::-1].hex().upper()
    name = _text(label).rstrip()
    return Superblock(
        kind="vfat",
        uuid=f"{digits[:4]}-{digits[4:]}",
        label="" if name == "NO NAME" else name,
    )


def _ntfs(start: bytes) -> Superblock | None:
    return Superblock(kind="ntfs") if start[3:11] == b"NTFS    " else None


def _exfat(start: bytes) -> Superblock | None:
    return Superblock(kind="exfat") if start[3:11] == b"EXFAT   " else None


def _swap(start: bytes) -> Superblock | None:
    if not any(start[page - 10 : page] in (b"SWAPSPACE2", b"SWAP-SPACE") for page in _PAGES):
        return None
    return Superblock(kind="swap", uuid=_uuid(start[1036:]), label=_text(start[1052:1068]))


_PARSERS = (_ext, _xfs, _btrfs, _vfat, _ntfs, _exfat, _swap)


def _uuid(raw: bytes) -> str:
    return str(uuid.UUID(bytes=raw[:16]))


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode("utf-8", errors="replace")
