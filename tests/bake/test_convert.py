"""Outputs of a finished image: each holds the same, and OCI layouts are read by skopeo."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from vmprovision.bake.convert import write_output
from vmprovision.bake.schema import Output
from vmprovision.progress import Control

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.bake.schema import OutputFormat

SIZE = 24 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image with some content that can be compressed and some that cannot."""
    path = tmp_path / "disk.raw"
    noise = hashlib.shake_128(b"noise").digest(3 << 20)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset, content in ((0, noise), (SIZE // 2, b"text " * 400_000), (SIZE - 512, b"end")):
            file.seek(offset)
            file.write(content)
    return path


def write(image: Path, output: Output, target: Path) -> None:
    """Write an output of the image."""
    write_output(image, "raw", output, target, architecture="x86_64", control=Control())


def content_of(image: Path, disk_format: str, scratch: Path) -> bytes:
    """Return the content that a machine sees on the disk."""
    plain = scratch / "plain.raw"
    subprocess.run(
        ["qemu-img", "convert", "-f", disk_format, "-O", "raw", image, plain], check=True
    )
    return plain.read_bytes()


@pytest.mark.parametrize(
    ("disk_format", "compress"),
    [
        ("qcow2", False),
        ("qcow2", True),
        ("raw", False),
        ("vmdk", False),
        ("vmdk", True),
        ("vhdx", False),
    ],
)
def test_every_format_holds_the_same(
    image: Path, tmp_path: Path, disk_format: OutputFormat, *, compress: bool
) -> None:
    """A machine sees the same bytes; a compressed file is smaller."""
    target = tmp_path / f"out.{disk_format}"
    write(image, Output(format=disk_format, compress=compress), target)
    about = json.loads(
        subprocess.run(
            ["qemu-img", "info", "--output=json", target], check=True, capture_output=True
        ).stdout
    )
    assert about["format"] == disk_format
    content = content_of(target, disk_format, tmp_path)
    assert content[:SIZE] == image.read_bytes()
    assert not content[SIZE:].strip(b"\0")  # VHDX and VMDK may be rounded up
    if compress:
        assert target.stat().st_size < 4 << 20


def test_an_oci_layout_is_what_kubevirt_wants(image: Path, tmp_path: Path) -> None:
    """Skopeo copies it; its one layer holds one disk in /disk for QEMU's user."""
    require(shutil.which("skopeo"), "skopeo is not installed")
    target = tmp_path / "guest.oci"
    write(image, Output(format="oci", compress=True), target)
    copied = tmp_path / "copied"
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", f"oci:{target}:latest", f"dir:{copied}"],
        check=True,
        capture_output=True,
    )
    about = json.loads(
        subprocess.run(
            ["skopeo", "inspect", f"oci:{target}"], check=True, capture_output=True
        ).stdout
    )
    assert (about["Architecture"], about["Os"], len(about["Layers"])) == ("amd64", "linux", 1)
    with tarfile.open(copied / about["Layers"][0].removeprefix("sha256:")) as layer:
        folder, disk = layer.getmembers()
        assert (folder.name, folder.isdir(), folder.uid, folder.gid) == ("disk", True, 107, 107)
        assert (disk.name, disk.mode, disk.uid, disk.gid) == ("disk/guest.qcow2", 0o440, 107, 107)
        layer.extract(disk, tmp_path, set_attrs=False)
    assert content_of(tmp_path / "disk/guest.qcow2", "qcow2", tmp_path) == image.read_bytes()


def test_the_same_image_gives_the_same_oci_layout(image: Path, tmp_path: Path) -> None:
    """Its bytes do not depend on the time or the place."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(image, Output(format="oci"), tmp_path / name / "guest.oci")
    files = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in tree if path.is_file()}
        for name in ("a", "b")
        for tree in [sorted((tmp_path / name).rglob("*"))]
    ]
    assert files[0] == files[1]
