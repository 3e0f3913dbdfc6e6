"""A guest that means harm reaches neither the appliance, nor the host, nor the terminal."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.conftest import state_of
from tests.image.tiny import tiny_disk
from tests.image.trees import Mount, Sight, differences, look_into
from tests.trees import OS_RELEASE, Link, Program
from vmprovision.appliance.roots import mount_guest
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.progress import Control

if TYPE_CHECKING:
    from tests.conftest import RunCli

pytestmark = pytest.mark.appliance

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.exe\x00\r"
FILES: dict[str, str | bytes | Link | Program | None] = {
    "/etc/os-release": f'{OS_RELEASE}NAME="x{ESCAPES}"\nPRETTY_NAME="Debian {ESCAPES}"\n#'
    + "x" * (3 << 20),
    "/etc/fstab": "/dev/sda /opt ext4 defaults 0 0\n/dev/\x1b[31m /boot ext4 defaults 0 0\n",
    "/opt": Link("/tmp"),  # noqa: S108 -- the appliance's, if it were followed there
    "/away": Link("/tmp"),  # noqa: S108 -- likewise
    "/etc/guest-agent.conf": Link("/../../../../etc/x"),
    "/etc/x": "precious\n",
    "/etc/systemd/system/guest-agent.service": Link("/dev/null"),
    "/usr/local/lib": Link("/../../../../../../srv/lib"),
    "/srv/lib": None,
}


def _hostile(root: Path) -> None:
    """Add what a mapping cannot hold: names that are not text, and a folder that is a link."""
    for name in (b"python3\xff\xfe", b"\x1b[2Jname", b"a\nb"):
        Path(os.fsdecode(os.fsencode(root / "usr/bin") + b"/" + name)).write_bytes(b"")
    shutil.rmtree(root / "usr/local/bin", ignore_errors=True)
    (root / "usr/local/bin").symlink_to("/../../../../../var/programs")
    (root / "var/programs").mkdir(parents=True)
    (root / "var/keep").write_text("a file with another name where the agent goes\n")
    os.link(root / "var/keep", root / "var/programs/guest-agent")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Return the disk of a hostile guest."""
    (tmp_path / "images").mkdir()
    return tiny_disk(tmp_path / "images" / "hostile.raw", FILES, finish=_hostile)


def test_hostile_guest_keeps_its_files_and_gets_the_agent(
    hostile: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    """Links are followed inside the guest or replaced, nothing else changes, all comes back."""
    sight = Sight(path=hostile, format="raw", mounts=[Mount(device="")])
    before = look_into(sight, tmp_path)
    host = {path: path.lstat().st_mtime_ns for path in (Path("/etc"), Path("/tmp"), Path("/srv"))}  # noqa: S108 -- the host's own
    done = run_cli("inject", hostile, "--vm-id", "vm-1")
    shown = done.stdout + done.stderr
    assert "\x1b" not in shown
    assert "\x9b" not in shown
    assert "\u202e" not in shown
    assert not (Path("/etc") / "x").exists()
    assert Path("/etc").lstat().st_mtime_ns == host[Path("/etc")]
    after = look_into(sight, tmp_path)
    changed = differences(before, after)
    assert after["/var/programs/guest-agent"].mode == 0o755
    assert after["/etc/guest-agent.conf"].kind == "0"
    assert "/etc/x" not in changed
    assert "/srv/lib/guest-agent/receipt.json" in changed
    known = ("/etc/", "/var/programs/guest-agent", "/srv/lib/guest-agent")
    assert [path for path in changed if not path.startswith(known)] == []
    run_cli("remove", hostile)
    assert differences(before, look_into(sight, tmp_path)) == {}


def test_appliance_is_out_of_reach(hostile: Path) -> None:
    """Neither a mount nor a write through a guest's absolute link arrives in the appliance."""
    before = state_of(hostile)
    drive = Drive(path=hostile, format="raw", readonly=True)
    with open_appliance([drive], control=Control()) as appliance:
        look = "ls -A /tmp; grep ' /tmp ' /proc/mounts; true"  # the appliance's own
        own = appliance.call("debug", "sh", [look])
        guest = mount_guest(appliance, wanted=None, readonly=False)
        assert "/opt" not in guest.mountpoints
        files = guest.filesystem
        away = PurePosixPath("/away")
        with pytest.raises(vmprovision.ApplyError):
            files.symlink(away / "link", "x")
        with pytest.raises(vmprovision.ApplyError):
            files.write(away / "file", b"x")
        with pytest.raises(vmprovision.ApplyError):
            files.make_directory(away / "folder")
        with pytest.raises(vmprovision.ApplyError):
            files.write(PurePosixPath("/../../../away/file"), b"x")
        assert files.lstat(away / "file") is None
        assert "python3" in files.list_directory(PurePosixPath("/usr/bin"))
        assert appliance.call("debug", "sh", [look]) == own
    assert state_of(hostile) == before
