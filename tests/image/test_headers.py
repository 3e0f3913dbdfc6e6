"""Images that are refused by their files alone, before any appliance is started."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from tests.image.conftest import check_refusal
from vmprovision.errors import ImageCorruptError, ImageReferenceError
from vmprovision.image.chain import open_chain
from vmprovision.image.check import check_image
from vmprovision.image.diskfile import open_disk_file
from vmprovision.image.header import is_unclean, read_references

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.image.conftest import Refuse

NOT_FOUND, FORMAT, LOCKED, CORRUPT, READ_ONLY, NO_ROOM, REFERENCE, RECOVERY = range(11, 19)
MB = 1 << 20
DATA_FILE, BACKING_FORMAT = 0x44415441, 0xE2792ACA


def qemu_img(*words: str | Path, cwd: Path | None = None) -> None:
    """Run qemu-img."""
    subprocess.run(["qemu-img", words[0], "-q", *words[1:]], check=True, cwd=cwd)


def make(path: Path, disk_format: str, *options: str) -> Path:
    """Return an image with 4 MiB of data in it."""
    qemu_img("create", "-f", disk_format, *options, path, "64M")
    write: list[str | Path] = ["qemu-io", "-f", disk_format, "-c", "write -q -P 7 1M 4M", path]
    subprocess.run(write, check=True, capture_output=True)
    return path


def check(image: Path, disk_format: str) -> None:
    """Look at an image and at all that it refers to, as every command does."""
    with (
        open_disk_file(image, write=False) as file,
        open_chain(file, disk_format, allow_outside=False, write=False) as base,
    ):
        check_image(base)


def forge_qcow2(
    path: Path,
    backing: bytes = b"",
    *,
    backing_format: bytes = b"raw",
    data_file: bytes | None = None,
    at: int = 1024,
) -> Path:
    """Make a qcow2 with any names in its header, the backing file's at this offset."""
    make(path, "qcow2", "-o", "cluster_size=2M")
    extensions = b""
    if backing_format:
        extensions += struct.pack(">II", BACKING_FORMAT, len(backing_format))
        extensions += backing_format.ljust(8, b"\0")
    if data_file is not None:
        padded = data_file.ljust((len(data_file) + 7) // 8 * 8, b"\0")
        extensions += struct.pack(">II", DATA_FILE, len(data_file)) + padded
    filler = (at - 112 - len(extensions) - 16) // 8 * 8
    extensions += struct.pack(">II", 0x12345678, filler) + bytes(filler) + bytes(8)
    with path.open("r+b") as file:
        file.seek(100)
        file.write(struct.pack(">I", 112))
        file.seek(112)
        file.write(extensions)
        if backing:
            file.seek(8)
            file.write(struct.pack(">QI", at, len(backing)))
            file.seek(at)
            file.write(backing)
        if data_file is not None:
            file.seek(72)
            file.write(struct.pack(">Q", 4))
    return path


@pytest.mark.parametrize("command", ["inspect", "inject", "recover"])
def test_missing_file(refuse: Refuse, tmp_path: Path, command: str) -> None:
    """A path at which nothing stands is exit code 11, whatever the command."""
    refuse(tmp_path / "no-such.qcow2", NOT_FOUND, command=command)


def test_not_a_file(refuse: Refuse, tmp_path: Path) -> None:
    """A pipe is not an image, and opening it does not hang."""
    os.mkfifo(tmp_path / "pipe.raw")
    refuse(tmp_path / "pipe.raw", NOT_FOUND)


def test_directory_without_a_guest(refuse: Refuse, tmp_path: Path) -> None:
    """A directory that is not a root filesystem is exit code 31, and stays empty."""
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", 31)
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("empty.raw", b"", CORRUPT),
        ("empty.qcow2", b"", FORMAT),
        ("letter.qcow2", b"Dear Sir,\n" * 100, FORMAT),
        ("letter.vmdk", b"Dear Sir,\n" * 100, FORMAT),
        ("disk.img", bytes(MB), FORMAT),
        ("disk", bytes(MB), FORMAT),
        ("disk.iso", bytes(MB), FORMAT),
        ("old.qcow", b"QFI\xfb\0\0\0\1" + bytes(MB), FORMAT),
    ],
)
def test_content_that_is_no_image(
    refuse: Refuse, tmp_path: Path, name: str, content: bytes, code: int
) -> None:
    """Empty files, texts and names that do not say the format are refused by name and header."""
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, code)


def test_unknown_stated_format(refuse: Refuse, tmp_path: Path) -> None:
    """A format that nobody knows, or that the header denies, is exit code 12."""
    image = make(tmp_path / "disk.img", "qcow2")
    refuse(image, FORMAT, "--format", "floppy")
    refuse(image, FORMAT, "--format", "vmdk")


@pytest.mark.parametrize("disk_format", ["qcow2", "vmdk", "vdi", "vhdx"])
@pytest.mark.parametrize("part", [0.5, 0.02, 0.0001])
def test_truncated(refuse: Refuse, tmp_path: Path, disk_format: str, part: float) -> None:
    """An image that ends too early is exit code 14, wherever it was cut."""
    image = make(tmp_path / f"cut.{disk_format}", disk_format)
    os.truncate(image, max(80, int(image.stat().st_size * part)))
    refuse(image, CORRUPT)


@pytest.mark.parametrize("kind", ["gpt", "dos"])
def test_truncated_raw(refuse: Refuse, tmp_path: Path, kind: str) -> None:
    """A raw disk is compared with its partition table."""
    require(shutil.which("sfdisk", path="/usr/sbin:/sbin:/usr/bin"), "sfdisk is not installed")
    image = tmp_path / "disk.raw"
    image.write_bytes(b"")
    os.truncate(image, 64 * MB)
    table = f"label: {kind}\nstart=2048, size=61440\nstart=63488\n"
    program = shutil.which("sfdisk", path="/usr/sbin:/sbin:/usr/bin") or "sfdisk"
    subprocess.run([program, "-q", image], input=table.encode(), check=True)
    check(image, "raw")
    os.truncate(image, 40 * MB)
    refuse(image, CORRUPT)


def test_raw_image_that_claims_to_be_qcow2(refuse: Refuse, tmp_path: Path) -> None:
    """A guest that writes a qcow2 header over its raw disk gets no file of the host."""
    image = forge_qcow2(tmp_path / "disk.raw", b"/etc/passwd")
    assert "qcow2" in refuse(image, FORMAT)["message"]


@pytest.mark.parametrize(
    "backing",
    [
        b"/etc/passwd",
        b"../outside.raw",
        b"link-out.raw",
        b"sub/inside.raw",
        b"missing.raw",
        b"nbd:127.0.0.1:10809",
        b"nbd+unix:///x?socket=/tmp/x",
        b"https://example.org/x.raw",
        b"fat:rw:/etc",
        b'json:{"driver":"file","filename":"/etc/passwd"}',
        b"json:",
        b"a\0b",
        b"n" * 300,
        b"loop.raw",
    ],
)
def test_backing_file_that_may_not_be_opened(tmp_path: Path, backing: bytes) -> None:
    """Only plain names of files in the image's own folder are followed."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "outside.raw").write_bytes(bytes(MB))
    (folder / "sub" / "inside.raw").write_bytes(bytes(MB))
    (folder / "link-out.raw").symlink_to("/etc/passwd")
    (folder / "loop.raw").symlink_to("loop.raw")
    image = forge_qcow2(folder / "disk.qcow2", backing)
    with pytest.raises(ImageReferenceError):
        check(image, "qcow2")


def test_backing_file_outside_the_folder(refuse: Refuse, tmp_path: Path) -> None:
    """The refusal names the file and the option that allows it."""
    image = forge_qcow2(tmp_path / "disk.qcow2", b"/etc/passwd")
    error = refuse(image, REFERENCE)
    assert "/etc/passwd" in error["message"]
    assert "--allow-backing" in error["hint"]


def test_name_that_reaches_out_of_what_was_read(refuse: Refuse, tmp_path: Path) -> None:
    """A backing name behind the first 64 KiB is read whole, as QEMU reads it, or refused."""
    (tmp_path / "json").write_bytes(bytes(MB))
    name = b'json:{"driver":"file","filename":"/etc/passwd"}'
    image = forge_qcow2(tmp_path / "disk.qcow2", name, at=(64 << 10) - len(b"json"))
    refuse(image, REFERENCE)


def test_backing_name_without_letters(tmp_path: Path) -> None:
    """A backing name of length 0 means no backing file, for QEMU and for vmprovision."""
    image = forge_qcow2(tmp_path / "disk.qcow2", b"x")
    with image.open("r+b") as file:
        file.seek(16)
        file.write(bytes(4))
    check(image, "qcow2")


def test_backing_file_without_a_format(refuse: Refuse, tmp_path: Path) -> None:
    """QEMU would guess the format of such a backing file, so it is refused."""
    (tmp_path / "base.raw").write_bytes(bytes(MB))
    image = forge_qcow2(tmp_path / "disk.qcow2", b"base.raw", backing_format=b"")
    refuse(image, REFERENCE)


def test_external_data_file(refuse: Refuse, tmp_path: Path) -> None:
    """A qcow2 whose data is in another file is refused where that file is outside."""
    refuse(forge_qcow2(tmp_path / "disk.qcow2", data_file=b"/etc/passwd"), REFERENCE)


def test_circular_backing(refuse: Refuse, tmp_path: Path) -> None:
    """Images that back each other are refused instead of being followed for ever."""
    forge_qcow2(tmp_path / "a.qcow2", b"b.qcow2", backing_format=b"qcow2")
    forge_qcow2(tmp_path / "b.qcow2", b"a.qcow2", backing_format=b"qcow2")
    refuse(tmp_path / "a.qcow2", REFERENCE)


def test_bad_reference_deep_in_the_chain(refuse: Refuse, tmp_path: Path) -> None:
    """Every image of a chain is looked at, not only the first."""
    forge_qcow2(tmp_path / "base.qcow2", b"/etc/passwd")
    forge_qcow2(tmp_path / "disk.qcow2", b"base.qcow2", backing_format=b"qcow2")
    refuse(tmp_path / "disk.qcow2", REFERENCE)


@pytest.mark.parametrize(("offset", "value"), [(32, struct.pack(">I", 1)), (32, b"\0\0\0\2")])
def test_encrypted_qcow2(refuse: Refuse, tmp_path: Path, offset: int, value: bytes) -> None:
    """An encrypted image is exit code 12, and the message says that it is encrypted."""
    image = make(tmp_path / "disk.qcow2", "qcow2")
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(value)
    assert "encrypted" in refuse(image, FORMAT)["message"]


def test_qcow2_marked_corrupt(refuse: Refuse, tmp_path: Path) -> None:
    """QEMU's own mark of damage is respected."""
    image = make(tmp_path / "disk.qcow2", "qcow2")
    with image.open("r+b") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 2))
    refuse(image, CORRUPT)


def test_stream_optimised_vmdk(refuse: Refuse, tmp_path: Path) -> None:
    """A VMDK that cannot be written in place is refused before anything is tried."""
    image = tmp_path / "disk.vmdk"
    qemu_img("create", "-f", "vmdk", "-o", "subformat=streamOptimized", image, "64M")
    assert "convert" in refuse(image, FORMAT)["hint"]


@pytest.mark.parametrize(
    "extent",
    [
        'RW 128 FLAT "/etc/passwd" 0',
        'RW 128 FLAT "sub/disk.vmdk" 0',
        'RW\n128\nFLAT\n"/etc/passwd" 0',
        'RW 128 SPARSE "/etc/passwd',
        'RW 128 FLAT "ok-flat.vmdk" 0\nRW 128 FLAT "../secret.vmdk" 0',
        'RW 128 SPARSE "inner.vmdk"',
        'RW 128 FLAT "ok-flat.vmdk" 0\nparentFileNameHint="/var/lib/other.vmdk"',
    ],
)
def test_vmdk_that_names_other_files(tmp_path: Path, extent: str) -> None:
    """A VMDK's descriptor cannot reach a file outside, by an extent or by a parent."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for path in ("sub/disk.vmdk", "ok-flat.vmdk", "../secret.vmdk"):
        (folder / path).write_bytes(bytes(128 * 512))
    # a sparse extent of no capacity holds a descriptor of its own, which QEMU follows
    inner = b"KDMV" + struct.pack("<IIQQQQ", 1, 3, 0, 128, 1, 20)
    (folder / "inner.vmdk").write_bytes(inner.ljust(64 << 10, b"\0"))
    image = folder / "disk.vmdk"
    image.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="twoGbMaxExtentFlat"\n{extent}\n'
    )
    with pytest.raises(ImageReferenceError):
        check(image, "vmdk")


def test_sparse_vmdk_with_a_hidden_parent(refuse: Refuse, tmp_path: Path) -> None:
    """QEMU follows parentFileNameHint even where parentCID says that there is no parent."""
    image = make(tmp_path / "disk.vmdk", "vmdk")
    content = bytearray(image.read_bytes())
    place = content.index(b"# The Disk Data Base")
    hint = b'parentFileNameHint="/etc/passwd"\n#'
    content[place : place + len(hint)] = hint
    image.write_bytes(content)
    refuse(image, REFERENCE)


@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentSparse", "monolithicSparse"])
def test_ordinary_vmdk_is_allowed(tmp_path: Path, kind: str) -> None:
    """A VMDK in pieces is fine where all its pieces are in its own folder."""
    image = tmp_path / "disk.vmdk"
    qemu_img("create", "-f", "vmdk", "-o", f"subformat={kind}", image, "64M")
    check(image, "vmdk")


def test_read_only_file(refuse: Refuse, tmp_path: Path) -> None:
    """A file without any write permission is exit code 15, even for root."""
    image = make(tmp_path / "disk.qcow2", "qcow2")
    image.chmod(0o444)
    refuse(image, READ_ONLY)
    refuse(image, READ_ONLY, command="remove")


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """Without a place for the redo log nothing begins, as whom modes bind sees it."""
    require(shutil.which("setpriv"), "setpriv is not installed")
    folder = tmp_path / "locked"
    folder.mkdir()
    image = make(folder / "disk.qcow2", "qcow2")
    folder.chmod(0o555)
    # root without its power over modes: another user might not reach this checkout
    powers = "-dac_override,-dac_read_search"
    bound = ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}"]
    command: list[str | Path] = [sys.executable, "-m", "vmprovision", "inject", "--json", image]
    done = subprocess.run(
        [*(bound if os.geteuid() == 0 else []), *command],
        check=False,
        capture_output=True,
        text=True,
    )
    folder.chmod(0o755)
    check_refusal(done.returncode, done.stdout, done.stderr, image, READ_ONLY)
    assert [path.name for path in folder.iterdir()] == ["disk.qcow2"]


def test_name_too_long_for_a_redo_log(refuse: Refuse, tmp_path: Path) -> None:
    """A name to which no suffix can be added is refused before the work, not after it."""
    refuse(make(tmp_path / f"{'n' * 210}.qcow2", "qcow2"), 10)


@pytest.fixture
def small_filesystem() -> Iterator[list[str]]:
    """Return a command prefix that gives a command a filesystem of 48 MiB at ``/mnt``."""
    probe = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt"]
    usable = os.geteuid() == 0 and shutil.which("unshare")
    worked = usable and subprocess.run(probe, check=False, capture_output=True).returncode == 0
    require(worked, "private mounts are not allowed here")
    mount = 'mount -t tmpfs -o size=48m none /mnt && cd /mnt && exec "$@"'
    yield ["unshare", "-m", "sh", "-c", mount, "sh"]  # noqa: PT022 -- it ends with the process


def test_host_disk_full(small_filesystem: list[str], tmp_path: Path) -> None:
    """Where the redo log has no room, exit code 16 says so and the image is as it was."""
    source = make(tmp_path / "disk.qcow2", "qcow2")
    script = (
        f"cp {source} /mnt/disk.qcow2; {sys.executable} -m vmprovision inject --json disk.qcow2;"
        f" code=$?; cmp {source} disk.qcow2 >&2 && [ $(ls | wc -l) = 1 ] && exit $code"
    )
    command = [*small_filesystem, "sh", "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    check_refusal(done.returncode, done.stdout, done.stderr, source, NO_ROOM)


PACKED = [
    ("disk.raw.gz", b"\x1f\x8b\x08", "gzip -dk"),
    ("named.qcow2", b"\x1f\x8b\x08", "gzip -dk"),
    ("disk.raw.xz", b"\xfd7zXZ\0", "xz -dk"),
    ("disk.bz2", b"BZh91AY", "bzip2 -dk"),
    ("disk.zst", b"\x28\xb5\x2f\xfd", "zstd -d"),
    ("disk.lz4", b"\x04\x22\x4d\x18", "lz4 -d"),
    ("disk.zip", b"PK\3\4", "unzip"),
    ("disk.7z", b"7z\xbc\xaf\x27\x1c", "7z x"),
    ("disk.ova", b"x".ljust(257, b"\0") + b"ustar", ".vmdk"),
    ("disk.tar", b"x".ljust(257, b"\0") + b"ustar", "tar -xf"),
    ("disk.vhd", b"conectix", "-f vpc"),
    ("disk.qed", b"QED\0", "-f qed"),
    ("disk.qcow", b"QFI\xfb\0\0\0\1", "-f qcow"),
    ("disk.hdd", b"WithoutFreeSpace", "-f parallels"),
    ("disk.iso", bytes(32769) + b"CD001", "installed guest"),
]


@pytest.mark.parametrize(("name", "start", "step"), PACKED)
def test_packed_image(refuse: Refuse, tmp_path: Path, name: str, start: bytes, step: str) -> None:
    """A file that only contains an image is named, with the command that extracts it."""
    path = tmp_path / name
    path.write_bytes(start.ljust(MB, b"\0"))
    error = refuse(path, FORMAT)
    assert step in error["hint"]
    if path.suffix != ".iso":
        assert step in refuse(path, FORMAT, "--format", "raw")["hint"]


@pytest.mark.parametrize("name", ["disk.vhd", "disk.dmg"])
def test_packed_image_by_its_end(refuse: Refuse, tmp_path: Path, name: str) -> None:
    """A fixed VHD and a DMG say what they are at their end."""
    magic = {"disk.vhd": b"conectix", "disk.dmg": b"koly"}[name]
    (tmp_path / name).write_bytes(bytes(MB) + magic.ljust(512, b"\0"))
    assert "qemu-img convert" in refuse(tmp_path / name, FORMAT)["hint"]


@pytest.mark.parametrize("size", [1 << 30, 2 << 50])
@pytest.mark.parametrize("filled", [False, True])
def test_qcow2_with_a_vast_table(
    refuse: Refuse, tmp_path: Path, size: int, *, filled: bool
) -> None:
    """A table of 32 MiB, each entry of which QEMU would follow, ends at once."""
    entries, cluster = 1 << 22, 1 << 16
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, 0, 0, 16, size, 0, entries, 3 * cluster, cluster, 1, 0, 0, 0, 0, 0),
        *(4, 104),
    )
    path = tmp_path / "disk.qcow2"
    entry = struct.pack(">Q", (1 << 63 | 4 * cluster) if filled else 0)
    with path.open("wb") as file:
        file.write(header)
        file.seek(cluster)
        file.write(struct.pack(">Q", 2 * cluster))
        file.seek(3 * cluster)
        file.write(entry * entries)
        file.truncate(4 * cluster + 8 * entries)
    begun = time.monotonic()
    refuse(path, CORRUPT)
    assert time.monotonic() - begun < 50


def test_vmdk_text_is_read_in_linear_time(tmp_path: Path) -> None:
    """A descriptor that is all beginnings of extents is read within a second or two."""
    image = tmp_path / "disk.vmdk"
    text = b"RW 1 A" + b" " * 60 + b"RW " * 300_000
    image.write_bytes(b"# Disk DescriptorFile\nversion=1\n" + text)
    begun = time.monotonic()
    with open_disk_file(image, write=False) as file:
        read_references(file, "vmdk")
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("kind", ["vmdk", "qcow2"])
def test_reference_that_is_no_utf8(tmp_path: Path, kind: str) -> None:
    """A name is its bytes: what looks like it when it is decoded is not looked at."""
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(bytes(128 * 512))
    (folder / os.fsdecode("a\ufffd".encode())).write_bytes(bytes(128 * 512))
    (folder / os.fsdecode(b"a\xff")).symlink_to(tmp_path / "outside")
    image = folder / f"disk.{kind}"
    if kind == "qcow2":
        forge_qcow2(image, b"a\xff")
    else:
        image.write_bytes(
            b"# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
            b'createType="monolithicFlat"\nRW 128 FLAT "a\xff" 0\n'
        )
    with pytest.raises(ImageReferenceError, match="outside"):
        check(image, kind)


@pytest.mark.parametrize("name", ["sub/../disk-flat.vmdk", "ABSOLUTE"])
def test_vmdk_whose_piece_has_a_winding_name(tmp_path: Path, name: str) -> None:
    """QEMU gets our open files under the pieces' names, so these stay in the folder."""
    (tmp_path / "sub").mkdir()
    flat = tmp_path / "disk-flat.vmdk"
    flat.write_bytes(bytes(128 * 512))
    image = tmp_path / "disk.vmdk"
    image.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW 128 FLAT "{flat if name == "ABSOLUTE" else name}" 0\n'
    )
    with pytest.raises(ImageReferenceError):
        check(image, "vmdk")


def unclean_qcow2(path: Path) -> Path:
    """Return a qcow2 with lazy refcounts whose writer was killed."""
    qemu_img("create", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "64M")
    write = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 256k", "-c", "abort", str(path)]
    subprocess.run(write, check=False, capture_output=True)
    return path


def test_unclean_qcow2(refuse: Refuse, tmp_path: Path) -> None:
    """It is not called damaged: QEMU repairs it, the message says how, and --repair lets it."""
    image = unclean_qcow2(tmp_path / "disk.qcow2")
    error = refuse(image, CORRUPT)
    assert "not closed" in error["message"]
    assert "--repair" in error["hint"]
    with (
        open_disk_file(image, write=True) as file,
        open_chain(file, "qcow2", allow_outside=False, write=True) as base,
    ):
        check_image(base)  # to read it, nothing needs to be repaired
        check_image(base, write=True, repair=True)
        assert not is_unclean(file)
        check_image(base, write=True)


@pytest.mark.parametrize("rest", [1, 100, 511])
def test_raw_disk_that_does_not_end_with_a_sector(tmp_path: Path, rest: int) -> None:
    """It is whole where its table says so."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(MB + rest))
    check(image, "raw")
    table = bytearray(512)
    table[446:462] = struct.pack("<B3xB3xII", 0, 0x83, 0, MB // 512 + 1)
    table[510:] = b"\x55\xaa"
    image.write_bytes(bytes(table) + bytes(MB - 512 + rest))
    with pytest.raises(ImageCorruptError, match="truncated"):
        check(image, "raw")
