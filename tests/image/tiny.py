"""Guests of a few files, put on a disk by mke2fs alone: hostile ones mostly."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conftest import require
from tests.trees import SYSTEMD_TREE, make_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.trees import Link, Program

PATH = "/usr/sbin:/sbin:/usr/bin:/bin"


def tiny_disk(
    image: Path,
    files: Mapping[str, str | bytes | Link | Program | None],
    *,
    finish: Callable[[Path], None] | None = None,
    size_mb: int = 16,
    block_size: int = 1024,
) -> Path:
    """Return a raw disk without partitions that holds a small systemd guest and these files.

    Args:
        image: the disk to make.
        files: what is put into the guest, or takes the place of what it has.
        finish: does what a mapping cannot say, given the directory.
        size_mb: the disk's size.
        block_size: the filesystem's, not below the sector size of the disk.
    """
    program = shutil.which("mke2fs", path=PATH)
    require(program, "mke2fs is not installed")
    with tempfile.TemporaryDirectory() as folder:
        root = make_tree(Path(folder) / "root", {**SYSTEMD_TREE, **files})
        if finish:
            finish(root)
        subprocess.run(
            [
                *(str(program), "-q", "-F", "-t", "ext4", "-E", "root_owner=0:0"),
                *("-b", str(block_size), "-d", str(root), str(image), f"{size_mb}M"),
            ],
            check=True,
            capture_output=True,
        )
    return image
