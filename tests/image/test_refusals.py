"""Images whose guest must not be written to: each its exit code, and not one byte changed."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import require
from tests.image.composed import compose_disk, ext4
from tests.image.layouts import guest_tar
from tests.image.tiny import PATH, tiny_disk
from tests.trees import SYSTEMD_TREE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tests.image.conftest import Refuse
    from tests.image.layouts import Disks

pytestmark = pytest.mark.appliance

RECEIPT = "/usr/local/lib/guest-agent/receipt.json"
MB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An image, the command that must refuse it, and how."""

    make: Callable[[Disks, Path], Path]
    code: int
    says: str
    options: tuple[str, ...] = ()
    command: str = "inject"
    slow: bool = False


def disk(name: str) -> Callable[[Disks, Path], Path]:
    """Return a copy of one of the disks of ``layouts.py``."""
    return lambda disks, folder: disks.copy(name, folder)


def tiny(**files: Any) -> Callable[[Disks, Path], Path]:  # noqa: ANN401 -- as make_tree takes it
    """Return a tiny guest with these files; ``__`` stands for a slash."""
    named = {"/" + name.replace("__", "/"): content for name, content in files.items()}
    return lambda _disks, folder: tiny_disk(folder / "tiny.raw", named)


def finished(finish: Callable[[Path], None]) -> Callable[[Disks, Path], Path]:
    """Make a tiny guest, finished by a function."""
    return lambda _disks, folder: tiny_disk(folder / "tiny.raw", {}, finish=finish)


def receipt(content: bytes) -> Callable[[Disks, Path], Path]:
    """Return a tiny guest with this receipt."""
    return lambda _disks, folder: tiny_disk(folder / "tiny.raw", {RECEIPT: content})


def _huge_receipt(root: Path) -> None:
    path = root / RECEIPT.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, 300 * MB)


def _circle(root: Path) -> None:
    shutil.rmtree(root / "usr/local")
    (root / "usr/local").symlink_to("/usr/other")
    (root / "usr/other").symlink_to("local")


def _pipe_as_agent(root: Path) -> None:
    os.mkfifo(root / "usr/local/bin/guest-agent")


def _no_python(root: Path) -> None:
    for path in (root / "usr/bin").glob("python*"):
        path.unlink()


def _luks(_disks: Disks, folder: Path) -> Path:
    program = shutil.which("cryptsetup", path=PATH)
    require(program, "cryptsetup is not installed")
    image = folder / "luks.raw"
    image.touch()
    os.truncate(image, 32 * MB)
    options = ["--batch-mode", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000"]
    command = [str(program), "luksFormat", *options, str(image), "-"]
    subprocess.run(command, input=b"secret", check=True)
    return image


# A backing device's superblock, by make-bcache(8): at byte 4096, its checksum first.
BCACHE = bytes.fromhex(
    "61aa27d917ca7dbe 0800000000000000 0100000000000000 c68573f64e1a45ca 8265f57f48ba6d81"
    "2eec1512766b4b82 ba23df52573844e7 75ee4ed2388f444c 88307b44a4dc6d7e"
).ljust(0xC0, b"\0") + bytes.fromhex("08000004")


def _bcache(_disks: Disks, folder: Path) -> Path:
    return _with_signature(folder / "bcache.raw", {4096: BCACHE})


def _zfs(_disks: Disks, folder: Path) -> Path:
    """Write the first label of a pool: the start of its list of names, and its uberblocks."""
    ring = {
        (128 + number << 10): struct.pack("<QQQ", 0x00BAB10C, 5000, number) for number in range(16)
    }
    label = b"\x01\x01\0\0" + struct.pack(">5I", 0, 1, 36, 32, 7) + b"version\0"
    return _with_signature(folder / "zfs.raw", {16384: label, **ring})


def _with_signature(image: Path, content: Mapping[int, bytes]) -> Path:
    with image.open("wb") as file:
        file.truncate(64 * MB)
        for offset, text in content.items():
            file.seek(offset)
            file.write(text)
    return image


def _squashfs(_disks: Disks, folder: Path) -> Path:
    program = shutil.which("sqfstar", path=PATH)
    require(program, "sqfstar is not installed")
    image = folder / "squash.raw"
    with guest_tar("bookworm").open("rb") as tree:
        command = [str(program), "-quiet", "-no-progress", "-comp", "gzip", str(image)]
        subprocess.run([*command, "-processors", "1"], stdin=tree, check=True, capture_output=True)
    return image


def _cut_filesystem(_disks: Disks, folder: Path) -> Path:
    image = tiny_disk(folder / "cut.raw", {})
    os.truncate(image, 3 * MB)
    return image


def _qcow2_header_in_raw(_disks: Disks, folder: Path) -> Path:
    image = folder / "disk.raw"
    create = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd"]
    subprocess.run([*create, image, "1M"], check=True)
    os.truncate(image, MB)
    return image


def _two_systems(_disks: Disks, folder: Path) -> Path:
    guest = ext4(files=SYSTEMD_TREE)
    return compose_disk(folder / "two.raw", "label: gpt", [guest, guest])


FORGED = b"""{"schema": 1, "agent_version": "0.0.1", "init": "systemd", "entries": [
{"path": "/\\ud800", "kind": "file", "before": {"kind": "absent"}}]}"""

CASES = {
    "full": Case(make=disk("full"), code=51, says="full"),
    "hibernated": Case(make=disk("hibernated"), code=34, says="hibernated"),
    "windows": Case(make=disk("windows"), code=34, says="Windows"),
    "bsd": Case(make=disk("bsd"), code=34, says="BSD"),
    "nothing": Case(make=disk("nothing"), code=31, says="no filesystem"),
    "two-systems": Case(make=_two_systems, code=32, says="/dev/sda1"),
    "wrong-root": Case(
        make=_two_systems,
        code=31,
        says="/dev/sda9",
        options=("--root", "/dev/sda9"),
        slow=True,
    ),
    "luks": Case(make=_luks, code=34, says="encrypted"),
    "bcache": Case(make=_bcache, code=34, says="bcache"),
    "zfs": Case(make=_zfs, code=34, says="ZFS", slow=True),
    "squashfs": Case(make=_squashfs, code=51, says="read-only"),
    "cut-filesystem": Case(make=_cut_filesystem, code=30, says="cannot be mounted", slow=True),
    "qcow2-in-raw": Case(
        make=_qcow2_header_in_raw, code=31, says="no filesystem", options=("--format", "raw")
    ),
    "circle-of-links": Case(make=finished(_circle), code=30, says="circle"),
    "damaged-receipt": Case(make=receipt(b'{"schema": 1, "ent'), code=30, says="damaged"),
    "later-receipt": Case(
        make=receipt(b'{"schema": 99}'), code=30, says="another version", slow=True
    ),
    "forged-receipt": Case(make=receipt(FORGED), code=30, says="surrogates", command="verify"),
    "huge-receipt": Case(make=finished(_huge_receipt), code=30, says="larger"),
    "pipe-as-agent": Case(make=finished(_pipe_as_agent), code=40, says="pipe"),
    "directory-as-agent": Case(
        make=tiny(**{"usr__local__bin__guest-agent__x": b""}), code=50, says="directory", slow=True
    ),
    "no-python": Case(make=finished(_no_python), code=34, says="Python", slow=True),
    "no-agent": Case(make=tiny(), code=40, says="no injected agent", command="remove", slow=True),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if case.slow else name
        for name, case in CASES.items()
    ],
)
def test_refused(name: str, disks: Disks, refuse: Refuse, tmp_path: Path) -> None:
    """The command ends with the cause's own exit code, says it, and leaves the image alone."""
    case = CASES[name]
    error = refuse(case.make(disks, tmp_path), case.code, *case.options, command=case.command)
    assert case.says in error["message"] + error["hint"]
