"""Rendered files, checked by the programs that will read them."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from vmprovision.initsystem.rendering import Service, render
from vmprovision.planning.injection import render_service
from vmprovision.runtime.archive import build_archive

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHELLS = (["dash"], ["bash", "--posix"], ["busybox", "ash"])
EXPOSURE_LIMIT = 2.0  # systemd-analyze's scale goes to 10; a service without options has 9.6


def rendered(init: str, name: str, port: int | None = None) -> bytes:
    """Return the content of one file of an init system."""
    return next(
        content for operation, content in render_service(init, port) if operation.path.name == name
    )


@pytest.fixture(params=["nobody", "root", "nobody, old systemd"])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return the path of a rendered unit whose program exists on this host."""
    user, _, old = request.param.partition(", ")
    content = render(
        "systemd/guest-agent.service.j2",
        service=Service(user=user),
        dynamic=not old,
        target="multi-user.target",
    ).decode()
    path = tmp_path / "guest-agent.service"
    path.write_text(content.replace("/usr/local/bin/guest-agent", "/bin/true"))
    return path


def test_systemd_finds_nothing_wrong_with_the_unit(unit: Path) -> None:
    """`systemd-analyze verify` reports nothing."""
    require(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    about_us = [line for line in done.stderr.splitlines() if "guest-agent" in line]
    assert (done.returncode, about_us) == (0, [])


def test_systemd_finds_the_unit_well_confined(unit: Path) -> None:
    """`systemd-analyze security` gives at most 2 of 10; 5 if it starts as root."""
    require(shutil.which("systemd-analyze"), "systemd-analyze is not installed")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    (summary,) = [line for line in done.stdout.splitlines() if "Overall exposure level" in line]
    is_root = "DynamicUser=yes" not in unit.read_text()
    assert float(summary.split(":")[1].split()[0]) <= (5 if is_root else EXPOSURE_LIMIT)


def test_the_sandbox_does_not_hide_what_is_reported() -> None:
    """/metrics has the size of a filesystem on /home, and a changed host name is visible."""
    lines = rendered("systemd", "guest-agent.service").decode().splitlines()
    assert "ProtectHome=read-only" in lines
    assert not [line for line in lines if line.startswith("ProtectHostname")]


def test_preset_names_the_unit() -> None:
    """A first boot's preset-all must not disable what the link enables."""
    lines = rendered("systemd", "00-guest-agent.preset").decode().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["enable guest-agent.service"]


def test_busybox_understands_the_inittab_line() -> None:
    """Four fields: a console of its own, all runlevels, respawn, and an absolute command."""
    lines = rendered("busybox", "inittab").decode().splitlines()
    (entry,) = [line for line in lines if not line.startswith("#")]
    console, levels, action, command = entry.split(":", 3)
    assert (console, levels, action) == ("null", "", "respawn")
    assert command.startswith("/usr/local/bin/guest-agent ")


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_shells_parse_what_they_are_given(shell: list[str], tmp_path: Path) -> None:
    """Every shell of guests accepts the launcher and the rc.local block."""
    require(shutil.which(shell[0]), f"{shell[0]} is not installed")
    script = tmp_path / "script"
    launcher = build_archive().content.split(b"PK\x03\x04")[0]
    for content in (launcher, b"#!/bin/sh\n" + rendered("standalone", "rc.local")):
        script.write_bytes(content)
        subprocess.run([*shell, "-n", script], check=True, timeout=30)


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    """Shellcheck accepts the launcher and the rc.local block."""
    require(shutil.which("shellcheck"), "shellcheck is not installed")
    launcher = build_archive().content.split(b"PK\x03\x04")[0]
    for content in (launcher, b"#!/bin/sh\n" + rendered("standalone", "rc.local")):
        script = tmp_path / "script"
        script.write_bytes(content)
        subprocess.run(["shellcheck", "--shell=sh", script], check=True, timeout=60)


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_the_loop_starts_a_failed_agent_again_and_ends_with_a_clean_one(
    shell: list[str], tmp_path: Path
) -> None:
    """rc.local returns at once; the loop restarts the agent until it exits with status 0."""
    require(shutil.which(shell[0]), f"{shell[0]} is not installed")
    runs = tmp_path / "runs"
    agent = tmp_path / "agent"
    agent.write_text(f"#!/bin/sh\necho run >> {runs}\n[ $(wc -l < {runs}) -ge 2 ]\n")
    agent.chmod(0o755)
    block = rendered("standalone", "rc.local").decode()
    block = block.replace("/usr/local/bin/guest-agent", str(agent)).replace("sleep 2", "sleep 0")
    script = tmp_path / "rc.local"
    script.write_text(f"#!/bin/sh\nset -e\n{block}echo reached\nwait\n")
    done = subprocess.run([*shell, script], capture_output=True, check=True, text=True, timeout=30)
    assert done.stdout == "reached\n"
    assert runs.read_text() == "run\nrun\n"


@pytest.fixture
def launch_with(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the agent's file with only these programs to be found."""
    programs = tmp_path / "bin"
    programs.mkdir()
    agent = tmp_path / "guest-agent"
    # no absolute places: they may hold a Python of this host
    launcher, mark, archive = build_archive().content.partition(b"PK\x03\x04")
    for place in (b"/usr/libexec/", b"/usr/bin/", b"/usr/local/bin/"):
        launcher = launcher.replace(place, b"/nowhere/")
    agent.write_bytes(launcher + mark + archive)
    agent.chmod(0o755)

    def launch(**found: str) -> subprocess.CompletedProcess[str]:
        for name, content in found.items():
            program = programs / name
            program.write_text(content)
            program.chmod(0o755)
        return subprocess.run(
            ["/bin/sh", agent, "--version"],
            capture_output=True,
            check=False,
            text=True,
            timeout=60,
            env={"PATH": str(programs)},
        )

    return launch


PYTHON = '#!/bin/sh\nexec /usr/bin/python3 "$@"\n'


def test_the_launcher_takes_the_first_python_that_works(
    launch_with: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """It skips a python3 that lacks a module, and finds python2."""
    broken = "#!/bin/sh\nexit 1\n"
    done = launch_with(python3=broken, python=broken, python2=PYTHON)
    assert (done.returncode, done.stderr) == (0, "")
    assert build_archive().version in done.stdout


def test_the_launcher_says_that_there_is_no_python(
    launch_with: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Without any Python it prints one sentence and exits with 127."""
    done = launch_with()
    assert done.returncode == 127
    assert done.stderr == "guest-agent: no usable Python found\n"
