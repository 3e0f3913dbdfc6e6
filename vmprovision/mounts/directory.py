"""Mounts of a guest that is a directory of this host, where its filesystems may be mounted."""

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
    """Return the mounts that would hide what is written, and notes on others.

    A tree may have been unpacked from several filesystems: what it holds where a device
    is to be mounted counts as that device's content, and there is a note on it.

    Args:
        reader: the guest's files.
        folder: where they are, without links.
        directories: of the guest, that matter.
    """
    here = mounted_below(folder)
    hidden, notes = [], []
    for mount in covering_mounts(reader, directories):
        if mount.place in here:
            continue
        if not mount.at_boot:
            notes.append(f"{mount.sentence} only when a person does so (noauto)")
        elif not mount.is_device:
            hidden.append(HiddenMount(mount=mount, why=mount.obstacle))
        elif reader.list_directory(mount.place):
            notes.append(f"{mount.sentence}; what the directory holds there is taken for it")
        else:
            why = "that directory is empty here and nothing is mounted on it"
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
