"""Guests without Python get the runtime, and lose it when they no longer need it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import OS_RELEASE, Link, Program, Tree, elf, make_tree, python_tree, tree_state
from vmprovision.errors import BundledRuntimeError
from vmprovision.guest.names import ARCHITECTURES
from vmprovision.runtime import store

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import RunCli

PLACE = "usr/local/lib/guest-agent/python"
HOST = {"x86_64": (62, 64), "aarch64": (183, 64)}[store.host_architecture()]


def bare_tree(root: Path, machine: int, bits: int) -> Path:
    """Make a BusyBox guest without Python for an architecture."""
    files: Tree = {
        "/etc/os-release": OS_RELEASE,
        "/bin/busybox": elf(machine, bits=bits, content=b"BusyBox v1.35.0"),
        "/sbin/init": Link("/bin/busybox"),
        "/etc/inittab": "::sysinit:/etc/rc\n",
        "/usr/bin": None,
    }
    return make_tree(root, files)


@pytest.fixture
def guest(runtime: Path, tmp_path: Path) -> Path:
    """Return a guest of this host's architecture without Python; build the runtime."""
    assert runtime.exists()
    return bare_tree(tmp_path / "guest", *HOST)


def add_python(guest: Path) -> None:
    """Give the guest a Python of its own."""
    make_tree(guest, python_tree(machine=HOST[0], bits=HOST[1]))


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\nexit 1\n"])
def test_a_python_that_cannot_run_the_agent_is_none(content: bytes, guest: Path) -> None:
    """If Python is a stub or an empty file, the report and the refusal say so."""
    make_tree(guest, {"/usr/bin/python3": Program(content)})
    found = vmprovision.inspect(guest).as_json()
    assert found["runtime"] == "bundled"
    assert found["interpreters"][0]["usable"] is False
    assert found["interpreters"][0]["fault"] == "is not a program but a script or an empty file"
    vmprovision.inject(guest)
    assert (guest / PLACE).is_file()
    with pytest.raises(vmprovision.UnsupportedGuestError, match="python3 is not a program"):
        vmprovision.plan(guest, vmprovision.InjectOptions(runtime="guest"))


def test_a_guest_without_python_gets_the_runtime(guest: Path, runtime: Path) -> None:
    """The runtime is in the plan before the agent, in the guest, the receipt and the report."""
    plan = vmprovision.plan(guest)
    paths = [str(planned.operation.path) for planned in plan.operations]
    assert paths.index("/" + PLACE) < paths.index("/usr/local/bin/guest-agent")
    report = vmprovision.inject(guest)
    assert (guest / PLACE).read_bytes() == runtime.read_bytes()
    assert (guest / PLACE).stat().st_mode & 0o7777 == 0o755
    assert any("bundled MicroPython 1.25.0" in note for note in report.notes)
    found = vmprovision.inspect(guest)
    assert found.as_json()["runtime"] == "bundled"
    assert found.as_json()["agent"]["runtime"] == "bundled"
    assert vmprovision.inject(guest).changed == ()
    assert vmprovision.verify(guest).mismatches == ()
    (guest / PLACE).write_bytes(b"another")
    assert any(PLACE in mismatch for mismatch in vmprovision.verify(guest).mismatches)


def test_removing_leaves_nothing(guest: Path) -> None:
    """Removing restores the guest."""
    before = tree_state(guest)
    vmprovision.inject(guest)
    vmprovision.remove(guest)
    assert tree_state(guest) == before


def test_the_runtime_goes_when_the_guest_has_python(guest: Path) -> None:
    """A later injection prefers the guest's own Python unless an option says otherwise."""
    vmprovision.inject(guest)
    add_python(guest)
    vmprovision.inject(guest, vmprovision.InjectOptions(runtime="bundled"))
    assert (guest / PLACE).exists()
    report = vmprovision.inject(guest)
    assert not (guest / PLACE).exists()
    assert report.notes == ()
    found = vmprovision.inspect(guest).as_json()
    assert (found["runtime"], found["agent"]["runtime"]) == ("guest", "guest")
    assert vmprovision.verify(guest).mismatches == ()


def test_what_stood_in_its_place_comes_back(guest: Path) -> None:
    """A foreign file at the runtime's path is set aside and restored."""
    make_tree(guest, {"/" + PLACE: "somebody else's"})
    before = tree_state(guest)
    vmprovision.inject(guest)
    assert (guest / PLACE).read_bytes() != b"somebody else's"
    vmprovision.remove(guest)
    assert tree_state(guest) == before


def test_guest_means_its_own(guest: Path) -> None:
    """With --runtime guest, a guest without Python is refused and not written to."""
    before = tree_state(guest)
    with pytest.raises(vmprovision.UnsupportedGuestError, match="no Python"):
        vmprovision.inject(guest, vmprovision.InjectOptions(runtime="guest"))
    assert tree_state(guest) == before


def test_a_micropython_of_the_guest_is_not_enough(guest: Path) -> None:
    """A guest's own MicroPython is not used: it lacks our additions."""
    make_tree(guest, {"/usr/bin/micropython": elf(HOST[0], bits=HOST[1])})
    assert vmprovision.inspect(guest).as_json()["runtime"] == "bundled"


def test_a_path_is_taken_after_a_look(guest: Path, runtime: Path, run_cli: RunCli) -> None:
    """--runtime PATH takes a static program for the guest's architecture and nothing else."""
    mine = guest.parent / "mine"
    shutil.copyfile(runtime, mine)
    with mine.open("ab") as file:
        file.write(b"mine")
    done = run_cli("inject", guest, "--runtime", mine)
    assert (guest / PLACE).read_bytes() == mine.read_bytes()
    assert f"run by {mine}" in done.stdout
    for content, complaint in (
        (elf(8, bits=32).content, "not a program for .*: it is for mipsel"),
        (elf(HOST[0], bits=HOST[1]).content, "damaged or needs libraries"),
        (b"#!/bin/sh\n", "not an ELF file"),
    ):
        mine.write_bytes(content)
        with pytest.raises(BundledRuntimeError, match=complaint):
            vmprovision.inject(guest, vmprovision.InjectOptions(runtime=mine))
    mine.unlink()
    with pytest.raises(BundledRuntimeError, match="No such file"):
        vmprovision.inject(guest, vmprovision.InjectOptions(runtime=mine))


@pytest.mark.parametrize(
    ("machine", "architecture"),
    [((8, 32), "mipsel"), ((258, 64), "loongarch64"), ((21, 64), "ppc64le"), ((22, 64), "elf-22")],
)
def test_a_guest_with_neither_is_told_what_to_do(
    machine: tuple[int, int], architecture: str, tmp_path: Path, run_cli: RunCli
) -> None:
    """The refusal names the architecture, and the command to build a runtime for it."""
    guest = bare_tree(tmp_path / "guest", *machine)
    before = tree_state(guest)
    empty = {"VMPROVISION_CACHE": str(tmp_path / "empty")}
    done = run_cli("inject", guest, "--json", check=False, env=empty)
    error = json.loads(done.stdout)
    assert error["exit_code"] == 34
    assert architecture in error["error"]["message"]
    assert "install python3" in error["error"]["hint"]
    buildable = architecture in ARCHITECTURES
    assert (f"vmprovision runtime build {architecture}" in error["error"]["hint"]) is buildable
    assert tree_state(guest) == before


def test_old_arm_kernels_get_nothing(runtime: Path, tmp_path: Path) -> None:
    """A guest with the old ARM ABI gets no runtime: its kernel may not support the new one."""
    assert runtime.exists()
    guest = bare_tree(tmp_path / "guest", 40, 32)
    assert vmprovision.inspect(guest).arch == "armv7l"
    busybox = guest / "bin/busybox"
    content = bytearray(busybox.read_bytes())
    content[36:40] = bytes(4)
    busybox.write_bytes(content)
    assert vmprovision.inspect(guest).arch == "arm-oabi"
    with pytest.raises(vmprovision.UnsupportedGuestError, match="no runtime for arm-oabi"):
        vmprovision.inject(guest)


def test_a_damaged_runtime_is_never_injected(
    guest: Path, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest of the runtime is checked before every injection."""
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path / "cache"))
    shutil.copytree(runtime.parent, store.cached_folder())
    with (store.cached_folder() / runtime.name).open("ab") as file:
        file.write(b"x")
    before = tree_state(guest)
    with pytest.raises(
        BundledRuntimeError, match=r"not have the SHA-256 that RUNTIMES\.json lists"
    ):
        vmprovision.inject(guest)
    assert tree_state(guest) == before
