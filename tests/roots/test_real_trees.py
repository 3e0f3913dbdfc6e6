"""The verdict and the plan on files of real guests, as they were installed."""

from __future__ import annotations

import shutil
import tarfile
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import SHARED, Link, Program, Tree, elf, make_tree

if TYPE_CHECKING:
    from pathlib import Path

TREES = SHARED / "trees"
ALPINE = SHARED / "alpine"
PYTHON: Tree = {"/usr/bin/python3": elf(), "/usr/lib/python3.11/os.py": ""}


@pytest.fixture
def etc_of(tmp_path: Path) -> Path:
    """Where a real /etc is copied to, beside the programs that its archive lacks."""
    return tmp_path / "guest"


def guest_with(etc_of: Path, name: str, programs: Tree) -> Path:
    """A real /etc, with stand-ins for the programs outside it."""
    source = TREES / name
    if not source.is_dir():
        pytest.skip(f"{source} is not there")
    shutil.copytree(source, etc_of, symlinks=True)
    return make_tree(etc_of, {**programs, **PYTHON})


def planned(root: Path) -> list[str]:
    """The paths of the service's own files, in the plan's order."""
    described = vmprovision.plan(root).as_json()["operations"]
    paths = [o["path"] for o in described if o["operation"] != "MakeDirectory"]
    ours = ("/usr/local/", "/etc/guest-agent.conf")
    return [path for path in paths if not path.startswith(ours)]


def test_centos_6_runs_sysv_scripts_under_upstart(etc_of: Path) -> None:
    """Its init.d and rcN.d are links into rc.d, and its Upstart runs the runlevels' scripts."""
    root = guest_with(etc_of, "centos6", {"/sbin/init": elf(content=b"com.ubuntu.Upstart")})
    guest = vmprovision.inspect(root)
    assert (guest.init.system, guest.init.pid1) == ("sysv", "upstart")
    assert (guest.init.dialect, guest.init.confidence) == ("redhat", "certain")
    assert planned(root) == [
        "/etc/rc.d/init.d/guest-agent",
        *(f"/etc/rc.d/rc{level}.d/K01guest-agent" for level in (0, 1, 6)),
        *(f"/etc/rc.d/rc{level}.d/S99guest-agent" for level in (2, 3, 4, 5)),
    ]


def test_ubuntu_14_04_gets_a_job(etc_of: Path) -> None:
    """It has init.d, rcN.d and systemd's directories too; Upstart is what runs it."""
    files: Tree = {
        "/sbin/init": elf(3, bits=32, content=b"com.ubuntu.Upstart"),
        "/etc/systemd/system": None,
        "/lib/systemd/systemd": elf(3, bits=32),
    }
    root = guest_with(etc_of, "ubuntu14.04-i386", files)
    guest = vmprovision.inspect(root)
    assert (guest.init.system, guest.init.pid1) == ("upstart", "upstart")
    assert planned(root) == ["/etc/init/guest-agent.conf"]


def test_gentoo_of_2011_gets_a_script_of_its_time(etc_of: Path) -> None:
    """Its inittab starts /sbin/rc, and its scripts are runscript's."""
    files: Tree = {
        "/sbin/init": elf(content=b"INIT: version booting /etc/inittab"),
        "/sbin/rc": elf(),
        "/sbin/runscript": elf(),
    }
    root = guest_with(etc_of, "gentoo2.0.1-openrc", files)
    guest = vmprovision.inspect(root)
    assert (guest.init.system, guest.init.pid1) == ("openrc", "sysvinit")
    assert guest.init.dialect == "runscript"
    assert planned(root) == ["/etc/init.d/guest-agent", "/etc/runlevels/default/guest-agent"]


def unpack(name: str, target: Path) -> Path:
    """One of Alpine's archives, without its devices."""
    archive = ALPINE / name
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    target.mkdir()
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.isfile() or m.isdir() or m.issym()]
        for member in members:
            path = target / member.name
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if member.issym():
                make_tree(target, {member.name: Link(member.linkname)})
            else:
                content = tar.extractfile(member)
                assert content is not None
                make_tree(target, {member.name: Program(content.read())})
    return make_tree(target, PYTHON)


def test_alpine_3_2_is_openrcs(tmp_path: Path) -> None:
    """BusyBox is process 1 and its inittab starts OpenRC, which is there."""
    root = unpack("alpine-3.2-openrc.tar.xz", tmp_path / "guest")
    guest = vmprovision.inspect(root)
    assert (guest.init.system, guest.init.pid1) == ("openrc", "busybox")
    assert guest.libc == "musl"
    assert planned(root) == ["/etc/init.d/guest-agent", "/etc/runlevels/default/guest-agent"]


@pytest.mark.parametrize("version", ["3.8.5-x86_64", "3.20.3-x86_64", "3.20.3-aarch64"])
def test_alpines_minimal_root_has_no_openrc(tmp_path: Path, version: str) -> None:
    """Its inittab names OpenRC, which is not there, so BusyBox's init respawns the agent."""
    root = unpack(f"alpine-minirootfs-{version}.tar.gz", tmp_path / "guest")
    guest = vmprovision.inspect(root)
    assert (guest.init.system, guest.init.pid1) == ("busybox", "busybox")
    assert guest.arch == version.rpartition("-")[2]
    assert planned(root) == ["/etc/inittab"]
