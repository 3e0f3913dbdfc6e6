"""Exact operations for each init system, and scripts that shells and tools accept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path, PurePosixPath

import pytest

from tests.conftest import require
from vmprovision.changes.operations import (
    EditBlock,
    Operation,
    Symlink,
    WriteFile,
)
from vmprovision.guest.facts import INIT_SYSTEMS, InitVerdict
from vmprovision.initsystem import DEFINITIONS, definition_of
from vmprovision.initsystem.rendering import Service

SHELLS = (["dash"], ["bash", "--posix"], ["busybox", "ash"])


def operations(name: str, dialect: str = "", hook: str | None = None) -> list[Operation]:
    """Return the operations for a guest of this kind."""
    verdict = InitVerdict(
        system=definition_of(name).name,
        pid1=name,
        confidence="told",
        evidence=(),
        hook=PurePosixPath(hook) if hook else None,
        dialect=dialect,
    )
    return definition_of(name).service_operations(Service(), verdict)


def shape(found: list[Operation]) -> list[str]:
    """Return each operation as one line."""
    return [
        f"{o.path} -> {o.target}"
        if isinstance(o, Symlink)
        else f"{o.path} {o.mode:04o}"
        if isinstance(o, WriteFile)
        else f"{o.path} block"
        for o in found
    ]


SYSV_LINKS = [
    *(f"rc{level}.d/K01guest-agent -> ../init.d/guest-agent" for level in (0, 1, 6)),
    *(f"rc{level}.d/S99guest-agent -> ../init.d/guest-agent" for level in (2, 3, 4, 5)),
]


@pytest.mark.parametrize(
    ("name", "dialect", "expected"),
    [
        (
            "sysv",
            "redhat",
            [
                "/etc/rc.d/init.d/guest-agent 0755",
                *(f"/etc/rc.d/{link}" for link in SYSV_LINKS),
            ],
        ),
        ("sysv", "debian", ["/etc/init.d/guest-agent 0755", *(f"/etc/{x}" for x in SYSV_LINKS)]),
        (
            "sysv",
            "debian-startpar",
            [
                "/etc/init.d/guest-agent 0755",
                *(f"/etc/{link}" for link in SYSV_LINKS),
                "/etc/init.d/.depend.stop block",
                "/etc/init.d/.depend.start block",
            ],
        ),
        (
            "openrc",
            "supervise-daemon",
            [
                "/etc/init.d/guest-agent 0755",
                "/etc/runlevels/default/guest-agent -> /etc/init.d/guest-agent",
            ],
        ),
        (
            "sysv",
            "suse-startpar",
            [
                "/etc/init.d/guest-agent 0755",
                *(f"/etc/init.d/rc{n}.d/K01guest-agent -> ../guest-agent" for n in (3, 5)),
                *(f"/etc/init.d/rc{n}.d/S99guest-agent -> ../guest-agent" for n in (3, 5)),
                "/etc/init.d/.depend.stop block",
                "/etc/init.d/.depend.start block",
            ],
        ),
        (
            "slackware",
            "",
            [
                "/etc/rc.d/rc.guest-agent 0755",
                "/etc/rc.d/rc.local_shutdown block",
                "/etc/rc.d/rc.local block",
            ],
        ),
        (
            "procd",
            "",
            [
                "/etc/init.d/guest-agent 0755",
                "/etc/rc.d/K01guest-agent -> ../init.d/guest-agent",
                "/etc/rc.d/S99guest-agent -> ../init.d/guest-agent",
            ],
        ),
        ("upstart", "", ["/etc/init/guest-agent.conf 0644"]),
        (
            "dinit",
            "",
            ["/etc/dinit.d/guest-agent 0644", "/etc/dinit.d/boot.d/guest-agent -> ../guest-agent"],
        ),
        ("dinit", "boot", ["/etc/dinit.d/guest-agent 0644", "/etc/dinit.d/boot block"]),
        (
            "finit",
            "",
            [
                "/etc/finit.d/available/guest-agent.conf 0644",
                "/etc/finit.d/enabled/guest-agent.conf -> ../available/guest-agent.conf",
            ],
        ),
    ],
)
def test_exactly_these_operations(name: str, dialect: str, expected: list[str]) -> None:
    """Files come first, the operation that enables the service last."""
    assert shape(operations(name, dialect)) == expected


def test_every_name_has_a_module_that_is_asked() -> None:
    """The names of the public type and of the definitions are the same."""
    assert {definition.name for definition in DEFINITIONS} == set(INIT_SYSTEMS)


@pytest.mark.parametrize("name", INIT_SYSTEMS)
def test_the_agent_does_not_stay_root(name: str) -> None:
    """Systemd's dynamic user or the agent's --user drops root."""
    definition = definition_of(name)
    for verdict in definition.without_guest():
        found = definition.service_operations(Service(), verdict)
        text = b"".join(o.content for o in found if isinstance(o, (WriteFile, EditBlock)))
        assert b"--user nobody" in text or b"DynamicUser=yes" in text


def script_of(name: str, dialect: str) -> bytes:
    """Return the script in the first operation of an init system."""
    first = operations(name, dialect)[0]
    assert isinstance(first, WriteFile)
    return first.content


SCRIPTS = [
    ("sysv", "redhat"),
    ("openrc", "supervise-daemon"),
    ("openrc", "openrc-run"),
    ("openrc", "runscript"),
    *[("runit", variant.dialect) for variant in definition_of("runit").variants],
    ("s6", "scandir"),
    ("slackware", ""),
    ("procd", ""),
]


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
@pytest.mark.parametrize(("name", "dialect"), SCRIPTS)
def test_shells_parse_the_scripts(
    name: str, dialect: str, shell: list[str], tmp_path: Path
) -> None:
    """Dash, bash and BusyBox's shell accept every script."""
    require(shutil.which(shell[0]), f"{shell[0]} is not installed")
    script = tmp_path / "script"
    script.write_bytes(script_of(name, dialect))
    subprocess.run([*shell, "-n", script], check=True, timeout=30)


def test_shellcheck_finds_nothing_in_the_sysv_script(tmp_path: Path) -> None:
    """Any /bin/sh may run it."""
    require(shutil.which("shellcheck"), "shellcheck is not installed")
    script = tmp_path / "script"
    script.write_bytes(script_of("sysv", "debian"))
    subprocess.run(["shellcheck", "--shell=sh", script], check=True, timeout=60)


@pytest.fixture
def sysv_script(tmp_path: Path) -> Path:
    """Return the script, changed to use a folder of the test and an agent that only waits."""
    agent = tmp_path / "bin" / "guest-agent"
    agent.parent.mkdir()
    agent.write_text(
        f"#!/bin/sh\necho $$ >> {tmp_path}/runs\ntrap 'exit 0' TERM\nwhile :; do sleep 0.1; done\n"
    )
    agent.chmod(0o755)
    (tmp_path / "subsys").mkdir()
    text = script_of("sysv", "redhat").decode()
    text = text.replace("/usr/local/bin/guest-agent", str(agent))
    text = text.replace("/var/run/", f"{tmp_path}/").replace("sleep 2", "sleep 0.1")
    text = text.replace("/var/lock/subsys/", f"{tmp_path}/subsys/")
    script = tmp_path / "guest-agent"
    script.write_text(text)
    script.chmod(0o755)
    return script


def ask(shell: list[str], script: Path, action: str) -> int:
    """Return the exit status of the script for an action."""
    path = shutil.which(shell[0])
    assert path
    body = script.read_text().partition("\n")[2]
    script.write_text(f"#!{path} {' '.join(shell[1:])}\n{body}")
    done = subprocess.run([script, action], check=False, timeout=30, stdout=subprocess.DEVNULL)
    return done.returncode


def runs_of(script: Path, count: int) -> list[int]:
    """Return the process numbers of the agents, once there are so many."""
    runs = script.parent / "runs"
    deadline = time.monotonic() + 15
    while True:
        numbers = [int(line) for line in runs.read_text().split()] if runs.exists() else []
        if len(numbers) >= count or time.monotonic() > deadline:
            assert len(numbers) == count
            return numbers
        time.sleep(0.05)


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_the_sysv_script_does_what_lsb_asks(shell: list[str], sysv_script: Path) -> None:
    """Start twice, status, restart after a crash, stop: with LSB's exit statuses."""
    require(shutil.which(shell[0]), f"{shell[0]} is not installed")
    lock = sysv_script.parent / "subsys" / "guest-agent"
    assert ask(shell, sysv_script, "status") == 3
    try:
        assert ask(shell, sysv_script, "start") == 0
        (first,) = runs_of(sysv_script, 1)
        assert lock.exists()
        assert ask(shell, sysv_script, "start") == 0
        assert ask(shell, sysv_script, "status") == 0
        os.kill(first, signal.SIGKILL)
        second = runs_of(sysv_script, 2)[1]
        assert ask(shell, sysv_script, "restart") == 0
        third = runs_of(sysv_script, 3)[2]
        assert not Path(f"/proc/{second}").exists()
    finally:
        stopped = ask(shell, sysv_script, "stop")
    assert stopped == 0
    assert not Path(f"/proc/{third}").exists()
    assert not lock.exists()
    assert ask(shell, sysv_script, "status") == 3
    assert ask(shell, sysv_script, "nonsense") == 2
