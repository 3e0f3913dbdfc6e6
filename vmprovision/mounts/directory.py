"""Mounts of a guest that is a directory of this host, some of which may be mounted there."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.mounts.covering import covering_mounts
from vmprovision.mounts.guestmount import HiddenMount

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmprovision.filesystem.protocol import GuestReader

MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")


def find_hidden(
    reader: GuestReader, folder: Path, directories: Iterable[PurePosixPath]
) -> tuple[list[HiddenMount], list[str]]:
    """Return the mounts that would hide what is written, and notes on other mounts.

    A tree may have been unpacked from several filesystems. If a directory has content where
    a device is to be mounted, it counts as the device's content, and a note says so.

    Args:
        reader: the guest's files.
        folder: the real path of the guest on the host.
        directories: guest paths that will be written to.
    """
    here = mounted_below(folder)
    hidden, notes = [], []
    for mount in covering_mounts(reader, directories):
        if mount.place in here:
            continue
        if not mount.at_boot:
            notes.append(f"{mount.sentence}, but not at boot (noauto)")
        elif not mount.is_device:
            hidden.append(HiddenMount(mount=mount, why=mount.obstacle))
        elif reader.list_directory(mount.place):
            notes.append(f"{mount.sentence}; the directory's content is taken for that filesystem")
        else:
            why = "that directory is empty and nothing is mounted on it here"
            hidden.append(HiddenMount(mount=mount, why=why))
    return hidden, notes


def mounted_below(folder: Path) -> set[PurePosixPath]:
    """Return the guest paths on which this host has something mounted (proc_pid_mountinfo(5))."""
    root = os.fsencode(folder).rstrip(b"/")
    found = set()
    for line in MOUNTINFO.read_bytes().splitlines():
        point = _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), line.split(b" ")[4])
        if point.startswith(root + b"/"):
            found.add(PurePosixPath(os.fsdecode(point[len(root) :])))
    return found
