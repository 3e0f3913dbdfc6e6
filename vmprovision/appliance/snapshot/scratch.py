"""The scratch disk of a saved appliance, on which restored ones rehearse."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmprovision.disklayout.partitions import SECTOR
from vmprovision.host.command import find_program, run

if TYPE_CHECKING:
    from pathlib import Path

SCRATCH = "scratch"  # its file, among those of a saved appliance
START = 2048 * SECTOR  # of the partition, where partitioning tools put it
BLOCK = 4096
BLOCKS = 3072  # mke2fs(8) makes no journal with fewer than 2048
LINUX = 0x83
SECONDS = 60.0


def make_scratch_disk(path: Path) -> None:
    """Make a small disk with one ext4 partition, as most guests have it.

    Raises:
        CommandError: mke2fs(8) failed, or is not installed.
    """
    entry = struct.pack("<B3sB3sII", 0, b"", LINUX, b"", START // SECTOR, BLOCKS * BLOCK // SECTOR)
    with path.open("wb") as file:
        file.write(bytes(446) + entry + bytes(48) + b"\x55\xaa")
        file.truncate(START + BLOCKS * BLOCK)
    layout = ["-t", "ext4", "-b", str(BLOCK), "-E", f"offset={START}"]
    run([find_program("mke2fs"), "-q", *layout, path, str(BLOCKS)], timeout=SECONDS)
