"""The initial RAM disk with which an appliance boots before it is saved."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conftest import require
from vmprovision.appliance.snapshot.initrd import WANTED, initrd_content, load_order
from vmprovision.host.kernel import MODULES, MODULES_VARIABLE, appliance_kernel, modules_of

if TYPE_CHECKING:
    import pytest

DEP = """\
kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/lib/crc16.ko
kernel/fs/jbd2/jbd2.ko:
kernel/lib/crc16.ko:
kernel/fs/btrfs/btrfs.ko: kernel/lib/raid6/raid6-pq.ko kernel/lib/libcrc32c.ko
kernel/lib/raid6/raid6-pq.ko:
kernel/lib/libcrc32c.ko:
kernel/arch/x86/crypto/crc32c-intel.ko:
kernel/crypto/crc32c_generic.ko:
kernel/net/unused.ko:
"""
SOFTDEP = """\
# Soft dependencies extracted from modules themselves.
softdep libcrc32c pre: crc32c
softdep ext4 pre: crc16 post: unused
softdep jbd2 post: unused
"""
ALIAS = """\
# Aliases extracted from modules themselves.
alias crc32c crc32c_generic
alias crc32c crc32c-intel
alias pci:v* unused
"""
CONTENT = {name: name.encode() * 900 for name in ("plain", "xz", "gz", "zst")}


def make_modules(folder: Path, dep: str, softdep: str = "", alias: str = "") -> Path:
    """Make a kernel's modules with these tables."""
    folder.mkdir()
    for name, content in (("dep", dep), ("softdep", softdep), ("alias", alias)):
        (folder / f"modules.{name}").write_text(content)
    return folder


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    """Hard and soft dependencies first, by aliases too; what is built in or absent is left out."""
    modules = make_modules(tmp_path / "modules", DEP, SOFTDEP, ALIAS)
    names = [Path(path).stem for path in load_order(modules, ["ext4", "no-such", "btrfs"])]
    assert names == [
        *("crc16", "jbd2", "ext4"),
        *("raid6-pq", "crc32c_generic", "crc32c-intel", "libcrc32c", "btrfs"),
    ]
    assert load_order(modules, ["crc32c-intel", "crc32c_intel"]) == [
        "kernel/arch/x86/crypto/crc32c-intel.ko"
    ]


def test_modules_that_need_each_other_do_not_hang(tmp_path: Path) -> None:
    """A soft dependency may lead in a circle."""
    modules = make_modules(
        tmp_path / "modules", "a.ko:\nb.ko: a.ko\n", "softdep a pre: b\n", "alias b a\n"
    )
    assert sorted(load_order(modules, ["a"])) == ["a.ko", "b.ko"]


def test_the_kernels_own_modules_are_found() -> None:
    """The order that depmod(8) wrote down for this host's kernel is kept."""
    kernel = appliance_kernel()
    require(kernel, "no kernel in /boot is readable")
    assert kernel is not None
    modules = modules_of(kernel)
    order = load_order(modules, WANTED)
    assert {Path(path).name.partition(".")[0] for path in order} >= {"virtio_blk", "xfs", "btrfs"}
    place = {path: number for number, path in enumerate(order)}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        if path in place:
            assert all(place[other] < place[path] for other in needed.split())


def test_packed_modules_are_unpacked(tmp_path: Path) -> None:
    """As cpio(1) sees it; what this host cannot unpack keeps the ending of its name."""
    cpio = shutil.which("cpio")
    require(cpio, "this host has no cpio", optional=True)
    names = ["plain.ko", "xz.ko.xz", "gz.ko.gz"]
    modules = make_modules(tmp_path / "modules", "".join(f"{name}:\n" for name in names))
    for name, content in CONTENT.items():
        (modules / f"{name}.ko").write_bytes(content)
    for program in ("xz", "gzip"):
        file = modules / ("xz.ko" if program == "xz" else "gz.ko")
        subprocess.run([program, "-n" if program == "gzip" else "-q", file], check=True)
    content = initrd_content(modules, {"init": b"#!/python\n"}, ("plain", "xz", "gz"))
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run([str(cpio), "-idm", "--quiet"], input=content, cwd=out, check=True)
    unpacked = {path.name: path.read_bytes() for path in (out / "modules").iterdir()}
    assert unpacked == {
        "000-plain.ko": CONTENT["plain"],
        "001-xz.ko": CONTENT["xz"],
        "002-gz.ko": CONTENT["gz"],
    }
    assert (out / "init").read_bytes() == b"#!/python\n"
    assert (out / "init").stat().st_mode & 0o111


def test_modules_packed_by_zstd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are unpacked by zstd(1), and by the kernel on a host without that."""
    zstd = shutil.which("zstd")
    require(zstd, "this host has no zstd", optional=True)
    modules = make_modules(tmp_path / "modules", "zst.ko.zst:\n")
    (modules / "zst.ko").write_bytes(CONTENT["zst"])
    subprocess.run([str(zstd), "-q", "--rm", modules / "zst.ko"], check=True)
    assert CONTENT["zst"] in initrd_content(modules, {}, ["zst"])
    packed = (modules / "zst.ko.zst").read_bytes()
    monkeypatch.setenv("PATH", "")
    content = initrd_content(modules, {}, ["zst"])
    assert packed in content
    assert b"modules/000-zst.ko.zst\0" in content


def test_the_folder_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel's name, or as supermin(1) is told."""
    monkeypatch.delenv(MODULES_VARIABLE, raising=False)
    assert modules_of(Path("/boot/vmlinuz-6.1.0-1-cloud-amd64")) == MODULES / "6.1.0-1-cloud-amd64"
    monkeypatch.setenv(MODULES_VARIABLE, "/elsewhere")
    assert modules_of(Path("/boot/vmlinuz-6.1")) == Path("/elsewhere")
