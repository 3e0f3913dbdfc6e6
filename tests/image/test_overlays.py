"""Overlays over open files: what they cost."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from vmprovision.image.chain import Layer, make_overlay
from vmprovision.image.diskfile import DiskFile
from vmprovision.image.header import FORMATS

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


def overlay_over(base: Path, image_format: str, overlay: Path) -> dict[str, Any]:
    """Make an overlay; return what QEMU says of it."""
    handles = [os.open(base, os.O_RDWR), os.open(overlay, os.O_RDWR | os.O_CREAT, 0o600)]
    try:
        below, above = (
            DiskFile(path=path, handle=handle)
            for path, handle in zip((base, overlay), handles, strict=True)
        )
        make_overlay(above, Layer(file=below, format=image_format))
    finally:
        for handle in handles:
            os.close(handle)
    done = subprocess.run(
        ["qemu-img", "info", "--output=json", overlay], capture_output=True, check=True, timeout=60
    )
    info: dict[str, Any] = json.loads(done.stdout)
    return info


@pytest.mark.parametrize(
    ("image_format", "size", "cluster"),
    [
        ("raw", 512, 4 << 10),
        ("raw", 16 * GIB, 4 << 10),
        ("raw", 16 * GIB + 512, 8 << 10),
        ("raw", 2048 * GIB, 64 << 10),
        ("qcow2", 2 * GIB, 4 << 10),
        ("qcow2", 200 * GIB, 16 << 10),
        ("qcow2", 32 << 40, 64 << 10),
        ("vdi", 2 * GIB, 64 << 10),
    ],
)
def test_an_overlay_copies_little_and_is_small(
    tmp_path: Path, image_format: str, size: int, cluster: int
) -> None:
    """Clusters are as small as they can be without large tables, and the size is the disk's."""
    assert image_format in FORMATS
    base = tmp_path / "base"
    if image_format == "raw":
        base.touch()
        os.truncate(base, size)
    else:
        create = ["qemu-img", "create", "-q", "-f", image_format, str(base), str(size)]
        subprocess.run(create, check=True, timeout=60)
    info = overlay_over(base, image_format, tmp_path / "overlay")
    assert info["cluster-size"] == cluster
    assert info["virtual-size"] == size
    assert (tmp_path / "overlay").stat().st_size <= 1 << 20
