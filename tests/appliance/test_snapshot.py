"""A saved appliance: what must be new after each restore, and what is not trusted."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from vmprovision.appliance.ahead import ApplianceAhead
from vmprovision.appliance.drives import Drive
from vmprovision.appliance.library import qemu_program
from vmprovision.appliance.session import open_appliance
from vmprovision.appliance.snapshot import packages, restore
from vmprovision.appliance.snapshot.host import (
    find_host_appliance,
    host_appliance,
)
from vmprovision.appliance.snapshot.host import restore as host_restore
from vmprovision.appliance.snapshot.ingredients import UnusableApplianceError
from vmprovision.appliance.snapshot.store import MANIFEST, SUSPECT
from vmprovision.host.cache import cache_directory
from vmprovision.progress import Control

if TYPE_CHECKING:
    from vmprovision.appliance.session import Appliance
    from vmprovision.appliance.snapshot.store import SavedAppliance

pytestmark = pytest.mark.appliance

CLOCK_SECONDS = 3
BUILD_SECONDS = 240.0
MAKE = """
from vmprovision.appliance.snapshot.host import host_appliance
from vmprovision.progress import Control
steps = []
saved = host_appliance(Control(report=lambda progress: steps.append(progress.step)))
print(saved.folder, saved.made)
"""

# A QEMU that loads no state and connects to no socket.
IDLE = """#!/bin/sh
for word; do
    [ "$last" != -name ] || name=$word
    last=$word
done
[ "$name" ] || exec {qemu} "$@" # asked what it can do
exec {qemu} -S -nodefaults -display none -name "$name"
"""


@pytest.fixture(scope="module")
def made_by_two(own_cache: Path) -> list[str]:
    """The output of two processes that build the appliance of an empty cache at the same time."""
    processes = [
        subprocess.Popen([sys.executable, "-c", MAKE], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=BUILD_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], own_cache
    return said


@pytest.fixture
def saved(made_by_two: list[str]) -> SavedAppliance:
    """This module's saved appliance; built again if a test before has damaged it."""
    assert made_by_two
    found = host_appliance(Control())
    assert found is not None
    return found


@pytest.fixture
def disk(tmp_path: Path) -> Drive:
    """A small empty disk."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return Drive(path=path, format="raw")


def shell(appliance: Appliance, command: str) -> str:
    """Return what a command prints inside the appliance."""
    return str(appliance.call("debug", "sh", [command])).strip()


@pytest.mark.usefixtures("own_cache")
def test_nothing_is_saved_ahead() -> None:
    """An image that is refused at once must not wait until an appliance is saved."""
    assert find_host_appliance() is None
    with contextlib.closing(ApplianceAhead(Control())):
        assert find_host_appliance() is None


def test_two_builders_at_once_make_one_appliance(made_by_two: list[str]) -> None:
    """Both get the same one, and nothing unfinished is left."""
    assert len(set(made_by_two)) == 1
    folder = cache_directory() / "appliance"
    assert [path for path in folder.iterdir() if path.is_dir()] == [Path(made_by_two[0].split()[0])]


def test_only_its_owner_can_read_it(saved: SavedAppliance) -> None:
    """Its memory runs on everybody's images."""
    assert saved.folder.stat().st_mode & 0o777 == 0o700
    assert saved.folder.stat().st_uid == os.geteuid()


def test_what_must_not_repeat_does_not(saved: SavedAppliance, disk: Drive) -> None:
    """The clock is right; random bytes and the machine-id are new in every restored appliance."""
    assert saved
    seen = []
    for _ in range(2):
        with open_appliance([disk], control=Control()) as appliance:
            assert not appliance.has_volumes, "this is a stock appliance"
            now = int(shell(appliance, "date +%s"))
            assert abs(now - time.time()) < CLOCK_SECONDS
            seen.append(
                (
                    shell(appliance, "head -c 16 /dev/urandom | od -An -tx1"),
                    shell(appliance, "cat /etc/machine-id"),
                    shell(appliance, "cat /proc/sys/kernel/random/uuid"),
                )
            )
    first, second = seen
    assert not set(first) & set(second)
    assert len(first[1]) == 32


def test_nothing_reaches_a_network(saved: SavedAppliance, disk: Drive) -> None:
    """The restored appliance has no network device but loopback."""
    assert saved
    with open_appliance([disk], control=Control()) as appliance:
        assert shell(appliance, "ls /sys/class/net") == "lo"


@pytest.mark.parametrize("name", ["kernel", "root.qcow2", "ram", "state", "qemu"])
def test_a_changed_file_is_not_used(saved: SavedAppliance, name: str) -> None:
    """One changed byte is enough, even with the size unchanged."""
    path = saved.folder / name
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(byte)
    assert find_host_appliance() is None
    trust(saved, name)
    found = find_host_appliance()  # for the next test: only this file was in the way
    assert found is not None
    assert found.folder == saved.folder


def test_what_others_can_write_to_is_not_used(saved: SavedAppliance) -> None:
    """Neither the appliance nor its cache, and a stock appliance is started instead."""
    saved.folder.chmod(0o770)
    assert find_host_appliance() is None
    saved.folder.chmod(0o700)
    assert find_host_appliance() == saved
    cache = cache_directory()
    cache.chmod(0o777)
    with pytest.raises(UnusableApplianceError, match="can be written by others"):
        find_host_appliance()
    assert host_appliance(Control()) is None
    cache.chmod(0o700)


def test_what_belongs_to_somebody_else_is_not_used(saved: SavedAppliance) -> None:
    """The owner may have put anything into its memory."""
    require(os.geteuid() == 0, "only root can give files away")
    os.chown(saved.folder, 65534, 65534)
    assert find_host_appliance() is None
    os.chown(saved.folder, 0, 0)
    os.chown(saved.folder / "ram", 65534, 65534)
    assert find_host_appliance() is None
    os.chown(saved.folder / "ram", 0, 0)
    trust(saved, "ram")
    assert find_host_appliance() == saved


def test_an_unrelated_package_leaves_it_in_use(
    saved: SavedAppliance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only an upgrade of a package that is inside makes it stale."""
    require(packages.DPKG.exists(), "this host has no dpkg")
    installed = packages.DPKG.read_text()
    status = tmp_path / "status"
    monkeypatch.setattr(packages, "DPKG", status)
    status.write_text(
        f"{installed}\nPackage: unrelated\nStatus: {packages.INSTALLED}\nVersion: 1\n"
    )
    before = (saved.folder / MANIFEST).stat().st_ino
    assert find_host_appliance() == saved
    noted = (saved.folder / MANIFEST).stat().st_ino
    assert noted != before
    assert find_host_appliance() == saved
    assert (saved.folder / MANIFEST).stat().st_ino == noted
    head, inside, tail = installed.partition("\nPackage: e2fsprogs\n")
    status.write_text(head + inside + tail.replace("\nVersion: ", "\nVersion: 9:", 1))
    assert find_host_appliance() is None
    status.write_text(installed)
    assert find_host_appliance() == saved


def test_a_truncated_state_is_built_again_without_a_warning(
    saved: SavedAppliance, disk: Drive, caplog: pytest.LogCaptureFixture
) -> None:
    """The command that finds it saves another appliance, and works."""
    os.truncate(saved.folder / "state", 1000)
    with caplog.at_level(logging.WARNING), open_appliance([disk], control=Control()) as appliance:
        assert not appliance.has_volumes, "this is a stock appliance"
    assert not caplog.records
    anew = find_host_appliance()
    assert anew is not None
    assert anew.made > saved.made


def test_an_appliance_that_does_not_restore_is_replaced_by_a_stock_one(
    saved: SavedAppliance,
    disk: Drive,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """QEMU refuses the state, then hangs; after the second failure it is not used again."""
    monkeypatch.setattr(restore, "RESTORE_SECONDS", 2.0)
    os.truncate(saved.folder / "state", 1000)
    trust(saved, "state")
    with open_appliance([disk], control=Control()) as appliance:
        assert appliance.has_volumes
    assert "starting a stock one" in caplog.text
    assert (saved.folder / SUSPECT).exists()
    (saved.folder / "qemu").write_text(IDLE.format(qemu=qemu_program()))
    trust(saved, "qemu")
    begun = time.monotonic()
    assert host_restore(Control()) is None
    assert time.monotonic() - begun > restore.RESTORE_SECONDS
    assert find_host_appliance() is None


def trust(saved: SavedAppliance, name: str) -> None:
    """Write the current status of a file into the manifest."""
    status = (saved.folder / name).lstat()
    times = [status.st_mtime_ns, status.st_ctime_ns]
    manifest = json.loads((saved.folder / MANIFEST).read_text())
    facts = [status.st_size, *times, status.st_ino, status.st_uid, status.st_mode]
    manifest["files"][name] = facts
    (saved.folder / MANIFEST).write_text(json.dumps(manifest))
