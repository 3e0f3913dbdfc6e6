"""`guest-agent once` and `guest-agent check`, on every interpreter."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import pytest

from .agents import free_port, running_agent, running_manager
from .test_process import ONE_OF_EACH, run_to_end

if TYPE_CHECKING:
    from pathlib import Path

    from .interpreters import Interpreter


def test_once_prints_metrics(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """One line of JSON with the keys of the contract, and status 0."""
    run = run_to_end(interpreter, program, "once")
    assert (run.returncode, run.stderr) == (0, "")
    answer = json.loads(run.stdout)
    assert isinstance(answer["memory_total_kb"], int)
    assert 0 <= answer["cpu_usage_percent"] <= 100
    empty = run_to_end(interpreter, program, "once", "--proc", str(tmp_path))
    assert set(json.loads(empty.stdout).values()) == {None}


def findings(
    interpreter: Interpreter, program: Path, *arguments: str
) -> tuple[int, dict[str, str]]:
    """Return the status of `check` and what it says of each subject, the kind of finding first."""
    run = run_to_end(interpreter, program, "check", *arguments)
    assert run.stderr == ""
    lines = [line.split(None, 2) for line in run.stdout.splitlines()]
    return run.returncode, {subject: f"{kind} {text}" for kind, subject, text in lines}


def test_check_of_an_agent_that_is_well(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Settings, port and manager are right: status 0."""
    with running_manager(200) as manager:
        config = f"VM_ID=web-1\nMANAGER_URL=http://127.0.0.1:{manager.port}/api\n"
        with running_agent(interpreter, program, tmp_path, config=config) as agent:
            port = ("--port", str(agent.port))
            status, found = findings(
                *(interpreter, program, *port, "--config", str(tmp_path / "agent.conf"))
            )
    assert status == 0
    assert found["port"] == f"ok the agent answers on port {agent.port}"
    assert found["vm_id"] == "ok web-1, from configuration"
    where = f"127.0.0.1:{manager.port}"
    assert found["manager"] == f"ok {where} answers over HTTP (with 501 to GET /api/)"
    assert found["agent"].startswith("ok version ")
    assert found["service"].startswith("note ")


def test_check_finds_what_is_wrong(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """A wrong value, a manager that is down and an agent that does not run are faults: status 1."""
    config = tmp_path / "conf"
    config.write_text(f"VM_ID=web-1\nPORT=x\nMANAGER_URL=http://127.0.0.1:{free_port()}\n")
    port = free_port()
    status, found = findings(interpreter, program, "--config", str(config), "--port", str(port))
    assert status == 1
    assert found["configuration"] == "fault configuration: PORT is not a port number: ignored"
    assert found["port"] == f"fault no agent answers on port {port} (Connection refused)"
    assert found["manager"] == "fault 127.0.0.1: Connection refused"


@ONE_OF_EACH
def test_check_of_what_is_not_the_agent(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Another server on the port, and one that sends nothing, are distinguished from the agent."""
    config = ("--config", str(tmp_path / "none"))
    with running_manager(200) as other:
        status, found = findings(interpreter, program, *config, "--port", str(other.port))
    assert status == 1
    assert found["port"] == f"fault something else answers on port {other.port}, with 501"
    assert found["configuration"].startswith("note ")
    assert "manager" not in found
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        status, found = findings(interpreter, program, *config, "--port", port)
    assert status == 1
    assert "no answer in" in found["port"]
    assert "none can listen" in found["port"]


@ONE_OF_EACH
def test_check_of_the_service(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """A missing or stopped installation is a fault."""
    folder = tmp_path / "usr/local/lib/guest-agent"
    folder.mkdir(parents=True)
    arguments = ("--root", str(tmp_path), "--proc", "/proc", "--port", str(free_port()))
    (folder / "installed").write_text("runit usual\n/etc/sv/guest-agent/run\n# /etc/rc.local\n")
    _, found = findings(interpreter, program, *arguments)
    assert found["service"] == (
        "fault installed for runit usual, but /etc/sv/guest-agent/run is gone"
    )
    (tmp_path / "etc/sv/guest-agent").mkdir(parents=True)
    (tmp_path / "etc/sv/guest-agent/run").touch()
    _, found = findings(interpreter, program, *arguments)
    assert found["service"].startswith("fault installed for runit usual, but it does not run; ")
    (folder / "installed").unlink()
    (folder / "receipt.json").touch()
    _, found = findings(interpreter, program, *arguments)
    assert found["service"].startswith("fault injected, but it does not run; process 1 is ")


@pytest.mark.parametrize(
    ("command_line", "runs"),
    [
        ("/usr/bin/python3 -S -E -s /usr/local/bin/guest-agent --user nobody", True),
        ("/usr/local/lib/guest-agent/python /usr/local/bin/guest-agent", True),
        ("/usr/local/bin/guest-agent --port 80", True),
        ("tail -f /usr/local/bin/guest-agent", False),
        ("/usr/bin/python3 -c pass /usr/local/bin/guest-agent", False),
        ("/usr/bin/python3 /usr/local/bin/guest-agent check", False),
        ("vi /usr/local/bin/guest-agent", False),
        ("/usr/local/bin/guest-agent-of-others", False),
        ("", False),
    ],
    ids=range(9),
)
@ONE_OF_EACH
def test_only_the_agent_itself_is_taken_for_it(
    interpreter: Interpreter, program: Path, tmp_path: Path, command_line: str, *, runs: bool
) -> None:
    """A process with the agent's path among its arguments is another one."""
    folder = tmp_path / "usr/local/lib/guest-agent"
    folder.mkdir(parents=True)
    (folder / "receipt.json").touch()
    (tmp_path / "proc" / "77").mkdir(parents=True)
    (tmp_path / "proc" / "77" / "cmdline").write_text(command_line.replace(" ", "\0") + "\0")
    arguments = ("--root", str(tmp_path), "--port", str(free_port()))
    _, found = findings(interpreter, program, *arguments)
    assert (found["service"] == "ok injected, runs as process 77") is runs


@ONE_OF_EACH
def test_check_of_a_renamed_link(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """update-rc.d gives links other numbers; a link that is gone is still a fault."""
    folder = tmp_path / "usr/local/lib/guest-agent"
    folder.mkdir(parents=True)
    (folder / "installed").write_text("sysv debian\n/etc/rc2.d/S99guest-agent\n")
    links = tmp_path / "etc/rc2.d"
    links.mkdir(parents=True)
    arguments = ("--root", str(tmp_path), "--proc", "/proc", "--port", str(free_port()))
    for name, is_gone in (("S01guest-agent", False), ("K01guest-agent", True), ("S01other", True)):
        (links / name).touch()
        _, found = findings(interpreter, program, *arguments)
        assert found["service"].endswith(" is gone") is is_gone
        (links / name).unlink()


@ONE_OF_EACH
def test_check_of_https(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """HTTPS is tried with the program that reports would go through."""
    config = tmp_path / "conf"
    config.write_text(f"VM_ID=a\nMANAGER_URL=https://127.0.0.1:{free_port()}\n")
    status, found = findings(interpreter, program, "--config", str(config))
    assert status == 1
    assert "curl ended with status 7" in found["manager"]


@pytest.mark.parametrize("word", ["once", "check"])
@ONE_OF_EACH
def test_words_take_the_usual_options_only(
    interpreter: Interpreter, program: Path, word: str
) -> None:
    """An option that is none is a wrong command line."""
    assert run_to_end(interpreter, program, word, "--nope").returncode == 2
