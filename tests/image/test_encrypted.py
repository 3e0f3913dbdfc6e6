"""Encrypted guests: opened by the keys that are given, refused without, and no key leaks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.conftest import state_of
from tests.image.stacks import Stack, build_stack, look
from vmprovision.disklayout.keyfile import KeyFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.image.conftest import Refuse

pytestmark = pytest.mark.appliance

GPT = "printf 'label: gpt\\n{}-\\n' | sfdisk -q $A; udevadm settle\n"
KEY = "correct-horse-battery"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An encrypted guest, and the keys that open it.

    Attributes:
        keys: volume -> what its key file holds.
        places: where filesystems of the guest are mounted, and how their devices begin.
        seen: a script that shows the guest's agent without any of our code.
    """

    stack: Stack
    keys: Mapping[str, bytes]
    places: Mapping[str, str] = field(default_factory=dict)
    seen: str = ""


CASES = {
    # the installers' layout of Debian: /boot is readable, a newline behind the passphrase
    "luks1": Case(
        stack=Stack(
            script=GPT.format("size=8MiB\\n")
            + f"""
mke2fs -q -t ext4 ${{A}}1; luks luks1 ${{A}}2 {KEY} made; mke2fs -q -t ext4 /dev/mapper/made
mount /dev/mapper/made /sysroot; mkdir /sysroot/boot; mount ${{A}}1 /sysroot/boot
guest <<END
/dev/mapper/cryptroot / ext4 defaults 0 1
UUID=$(blkid -o value -s UUID ${{A}}1) /boot ext4 defaults 0 2
END
"""
        ),
        keys={"/dev/sda2": f"{KEY}\n".encode()},
        places={"/": "/dev/mapper/luks-", "/boot": "/dev/sda1"},
        seen=f"printf {KEY} | cryptsetup open --key-file - /dev/sda2 seen "
        "&& mount -o ro,noload /dev/mapper/seen /sysroot && ls /sysroot/usr/local/bin",
    ),
    # Ubuntu's and Fedora's: a volume group inside
    "lvm-on-luks2": Case(
        stack=Stack(
            script=GPT.format("")
            + f"""
luks luks2 ${{A}}1 {KEY} made
lvm pvcreate -q /dev/mapper/made; lvm vgcreate -q vg /dev/mapper/made
lvm lvcreate -q -y -L 20M -n root vg; lvm lvcreate -q -y -L 8M -n var vg
mke2fs -q -t ext4 /dev/vg/root; mke2fs -q -t ext4 /dev/vg/var
mount /dev/vg/root /sysroot; mkdir /sysroot/var; mount /dev/vg/var /sysroot/var
guest <<END
/dev/mapper/vg-root / ext4 defaults 0 1
/dev/mapper/vg-var /var ext4 defaults 0 2
END
""",
            sizes_mb=(64,),
        ),
        keys={"all": KEY.encode()},
        places={"/": "/dev/vg/root", "/var": "/dev/vg/var"},
    ),
    # each volume with its key, one of them binary, and named by crypttab only
    "luks-on-lvm": Case(
        stack=Stack(
            script=GPT.format("")
            + """
lvm pvcreate -q ${A}1; lvm vgcreate -q vg ${A}1
lvm lvcreate -q -y -L 40M -n ro-ot vg; lvm lvcreate -q -y -L 24M -n var vg
luks luks2 /dev/vg/ro-ot 'one\\n' made1; luks luks2 /dev/vg/var 'two\\0\\377' made2
mke2fs -q -t ext4 /dev/mapper/made1; mke2fs -q -t ext4 /dev/mapper/made2
mount /dev/mapper/made1 /sysroot; mkdir /sysroot/var; mount /dev/mapper/made2 /sysroot/var
guest <<END
/dev/mapper/r / ext4 defaults 0 1
/dev/mapper/cvar /var ext4 defaults 0 2
END
printf 'r /dev/mapper/vg-ro--ot none luks\\n# a comment\\n' >/sysroot/etc/crypttab
echo "cvar UUID=$(cryptsetup luksUUID /dev/vg/var) /etc/keys/var luks" >>/sysroot/etc/crypttab
""",
            sizes_mb=(80,),
        ),
        keys={"/dev/mapper/vg-ro--ot": b"one\n", "/dev/vg/var": b"two\0\xff"},
        places={"/": "/dev/mapper/luks-", "/var": "/dev/mapper/luks-"},
    ),
}


def key_files(folder: Path, keys: Mapping[str, bytes]) -> tuple[KeyFile, ...]:
    """Write the keys to files that only their owner can read."""
    files = []
    for number, (volume, content) in enumerate(keys.items()):
        path = folder / f"key-{number}"
        path.touch(mode=0o600)
        path.write_bytes(content)
        files.append(KeyFile(path=path, volume=volume))
    return tuple(files)


@pytest.mark.parametrize(
    "name", ["luks1", "luks-on-lvm", pytest.param("lvm-on-luks2", marks=pytest.mark.slow)]
)
def test_an_encrypted_guest_is_injected_with_its_keys(name: str, tmp_path: Path) -> None:
    """The agent is in it, a second injection writes nothing, and every layer is mounted."""
    case = CASES[name]
    disks = tmp_path / "disks"
    disks.mkdir()
    (image,) = build_stack(disks, case.stack)
    source = vmprovision.ImageOptions(keys=key_files(tmp_path, case.keys))
    report = vmprovision.inject(image, source=source)
    assert "/usr/local/bin/guest-agent" in map(str, report.changed)
    mountpoints = report.guest.mountpoints
    assert mountpoints.keys() == case.places.keys()
    for place, beginning in case.places.items():
        assert mountpoints[place].startswith(beginning)
    if case.seen:
        assert "guest-agent" in look([image], case.seen)
    before = state_of(image)
    assert vmprovision.inject(image, source=source).changed == ()
    assert state_of(image) == before


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an encrypted guest that no test writes to."""
    folder = tmp_path_factory.mktemp("locked")
    (image,) = build_stack(folder, CASES["luks1"].stack)
    return image


def test_without_a_key_the_refusal_says_how_to_give_one(locked: Path, refuse: Refuse) -> None:
    """It names the device and the option."""
    error = refuse(locked, 34)
    assert "/dev/sda2" in error["message"]
    assert "--key /dev/sda2:file:" in error["hint"]


@pytest.mark.parametrize("volume", ["all", "/dev/sda2"])
def test_a_wrong_key_has_its_own_exit_code(
    volume: str, locked: Path, refuse: Refuse, tmp_path: Path
) -> None:
    """The message names the volume, and never the key."""
    (wrong,) = key_files(tmp_path, {volume: b"hunter2"})
    error = refuse(locked, 35, "--key", f"{volume}:file:{wrong.path}")
    assert "/dev/sda2" in error["message"]
    assert "hunter2" not in json.dumps(error)


def test_a_key_is_seen_nowhere(locked: Path, tmp_path: Path) -> None:
    """Not in an argument, in an environment or in what is logged at the highest level."""
    (right,) = key_files(tmp_path, {"all": KEY.encode()})
    log = tmp_path / "log"
    traced = {**os.environ, "LIBGUESTFS_TRACE": "1", "LIBGUESTFS_DEBUG": "1"}
    command = [sys.executable, "-m", "vmprovision", "-vv", "inspect", str(locked)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--key-file", str(right.path)], stdout=output, stderr=output, env=traced
        )
        seen = set()
        while process.poll() is None:
            seen |= processes()
            time.sleep(0.05)
    assert process.returncode == 0, log.read_bytes()[-2000:]
    assert any(b"qemu" in each for each in seen)
    for text in (*seen, log.read_bytes()):
        assert KEY.encode() not in text


def processes() -> set[bytes]:
    """Return the arguments and the environment of every process of this user."""
    found = set()
    for path in (*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")):
        with contextlib.suppress(OSError):  # gone, or somebody else's
            found.add(path.read_bytes())
    return found
