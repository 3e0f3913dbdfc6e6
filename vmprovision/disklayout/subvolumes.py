"""Names of btrfs's subvolumes, as libguestfs has them: ``btrfsvol:/dev/sda2/@``."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

BTRFS = "btrfs"
_PREFIX = "btrfsvol:"


def name_subvolume(device: str, path: str) -> str:
    """Return the name of a subvolume of a device."""
    return f"{_PREFIX}{device}/{path}"


def split_subvolume(name: str) -> tuple[str, str | None]:
    """Split ``btrfsvol:/dev/sda2/@`` into ``/dev/sda2`` and ``@``; return None for other devices.

    The device of a logical volume has one directory more: ``/dev/VG/LV``.
    """
    if not name.startswith(_PREFIX):
        return name, None
    parts = PurePosixPath(name.removeprefix(_PREFIX)).parts
    length = 3 if re.fullmatch(r"[shv]d[a-z]+\d*|md\d+", parts[2]) else 4
    return str(PurePosixPath(*parts[:length])), "/".join(parts[length:])


def subvolume_options(name: str) -> tuple[str, str]:
    """Return the device node of a device or subvolume, and the options that mount it."""
    node, subvolume = split_subvolume(name)
    return node, f"subvol={subvolume}" if subvolume else ""
