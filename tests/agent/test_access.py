"""Who may ask the agent, and through which doors."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from vmprovision.agent import access, compat, config

from .agents import Response, parse_response, receive_all, running_agent
from .interpreters import find_cpythons, one_of_each
from .test_process import run_to_end
from .test_pure import Collect

if TYPE_CHECKING:
    from pathlib import Path

    from .agents import Agent
    from .interpreters import Interpreter


def ask(agent: Agent, *fields: str) -> Response:
    """What the agent answers to GET /metrics with these header fields."""
    lines = ["GET /metrics HTTP/1.1", "Host: guest", "Connection: close", *fields]
    return parse_response(agent.exchange("\r\n".join([*lines, "", ""]).encode()))


def ask_on_path(path: Path) -> Response:
    """What the agent answers on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        return parse_response(receive_all(sock))


# --- addresses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allow", "address", "allowed"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("10.0.0.0/8, 2001:db8::/33", "10.255.0.1", True),
        ("10.0.0.0/8, 2001:db8::/33", "2001:db8:7fff::1", True),
        ("10.0.0.0/8, 2001:db8::/33", "2001:db8:8000::1", False),
        ("192.0.2.1/31", "192.0.2.0", True),
        ("192.0.2.1/31", "192.0.2.2", False),
        ("192.0.2.0/24", "::ffff:192.0.2.7", True),
        ("::ffff:192.0.2.0/120", "192.0.2.7", True),
        ("192.0.2.0/24", "::192.0.2.7", False),
        ("0.0.0.0/0", "198.51.100.1", True),
        ("0.0.0.0/0", "2001:db8::1", False),
        ("::/0", "198.51.100.1", False),
        ("192.0.2.1", "127.0.0.1", True),
        ("192.0.2.1", "::1", True),
        ("192.0.2.1", "::ffff:127.0.0.1", True),
    ],
)
def test_who_is_allowed(allow: str, address: str, allowed: bool) -> None:  # noqa: FBT001 -- a case
    """Addresses and networks of both versions, IPv4 on an IPv6 socket, and always the guest."""
    packed = compat.pack_address(address)
    assert packed is not None
    assert access.is_allowed(access.parse_allow(allow), packed) is allowed
    assert access.is_allowed(None, packed)


@pytest.mark.parametrize("allow", ["a", "10.0.0.0/33", "::/129", "10/8", "10.0.0.0/", "1.2.3.4/-1"])
def test_a_list_that_is_none_shuts_everybody_out(allow: str) -> None:
    """Who meant to shut somebody out has not let everybody in by a slip of the pen."""
    collect = Collect()
    settings = config.parse_settings([("ALLOW", allow), ("READ_TOKEN", "a b")], collect)
    assert not access.is_allowed(settings.allow, compat.pack_address("10.0.0.1"))
    assert not access.shows([b"Bearer a b"], settings.read_token)
    assert len(collect.lines) == 2
    assert settings.read_token is not None


def other_address() -> str:
    """An IPv4 address of this host that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this host has no address but loopback")
        address: str = sock.getsockname()[0]
    return address


def test_strangers_are_turned_away(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """Who is not in ALLOW is disconnected without an answer; the guest itself is served."""
    here = other_address()
    with running_agent(
        *(interpreter, program, tmp_path), listen=None, config="ALLOW=203.0.113.7\n"
    ) as agent:
        with socket.create_connection((here, agent.port), timeout=10) as stranger:
            assert receive_all(stranger) == b""
        assert agent.get("/health").status == 200
        agent.await_log("ALLOW does not name")
    with (
        running_agent(
            *(interpreter, program, tmp_path), listen=None, arguments=["--allow", f"{here}/32"]
        ) as agent,
        socket.create_connection((here, agent.port), timeout=10) as friend,
    ):
        friend.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert parse_response(receive_all(friend)).status == 200


# --- tokens -------------------------------------------------------------------------------------


def test_readers_show_a_token(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """With READ_TOKEN set it, or TOKEN, must be shown; every other request is answered 401."""
    settings = "READ_TOKEN=r3ad\nTOKEN=t0k3n\n"
    with running_agent(interpreter, program, tmp_path, config=settings) as agent:
        for shown in ("r3ad", "t0k3n"):
            assert ask(agent, f"Authorization: Bearer {shown}").status == 200
        for fields in (
            [],
            ["Authorization: Bearer r3a"],
            ["Authorization: Bearer r3ad3"],
            ["Authorization: Bearer"],
            ["Authorization: Basic r3ad"],
            ["Authorization: Bearer r3ad", "Authorization: Bearer r3ad"],
        ):
            refused = ask(agent, *fields)
            assert refused.status == 401
            assert refused.headers["www-authenticate"] == "bearer"
        assert agent.get("/nothing").status == 401
        assert "r3ad" not in agent.log_text()


def test_a_token_alone_is_for_the_manager(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """TOKEN does not close the endpoints for readers: the manager polls them without."""
    with running_agent(interpreter, program, tmp_path, config="TOKEN=t0k3n\n") as agent:
        assert ask(agent).status == 200


@pytest.mark.parametrize("interpreter", list(find_cpythons())[-1:], indirect=True)
def test_sighup_changes_who_may_ask(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """A new READ_TOKEN holds at once, also for connections that are open."""
    with running_agent(interpreter, program, tmp_path) as agent:
        assert ask(agent).status == 200
        (tmp_path / "agent.conf").write_text("READ_TOKEN=r3ad\n")
        agent.run.send_signal(signal.SIGHUP)
        agent.await_log("reading the configuration again")
        assert ask(agent).status == 401


# --- doors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        *("unix:", "unix:relative", "unix:/a:9", "unix:/a:1777", "unix:/" + "x" * 107),
        *("vsock:", "vsock:x", "vsock:1:2:3", "vsock:4294967296"),
        *("a/b", "127.0.0.1,http://x"),
    ],
)
def test_doors_that_are_none(value: str) -> None:
    """A list with one wrong door is refused as a whole."""
    with pytest.raises(ValueError, match=r"has a|is not"):
        config.parse_doors(value)


def test_a_unix_socket_is_a_door(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """It has the mode that was asked for, and stands beside an address."""
    path = tmp_path / "agent.sock"
    listen = f"127.0.0.1,unix:{path}:0600"
    with running_agent(interpreter, program, tmp_path, listen=listen) as agent:
        # who answers has opened all of its listeners
        assert agent.get("/health").status == ask_on_path(path).status == 200
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_stale_socket_is_replaced_and_nothing_else(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """One that nobody listens on goes; one that is served, and a file, stay and end the start."""
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listen = f"127.0.0.1,unix:{path}"
    arguments = ["--listen", f"unix:{path}", "--config", "/none"]
    with running_agent(interpreter, program, tmp_path, listen=listen):
        assert ask_on_path(path).status == 200
        second = run_to_end(interpreter, program, *arguments)
        assert second.returncode == 1
        assert "cannot listen on unix:" in second.stderr
        assert ask_on_path(path).status == 200
    path.unlink()
    path.write_text("precious")
    assert run_to_end(interpreter, program, *arguments).returncode == 1
    assert path.read_text() == "precious"


@pytest.mark.parametrize("interpreter", one_of_each(), indirect=True)
def test_vsock_is_a_door(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """The agent listens on a vsock port, as the kernel confirms: it is taken for others."""
    try:
        probe = socket.socket(socket.AF_VSOCK)
    except OSError:
        pytest.skip("this kernel has no vsock")
    with (
        probe,
        running_agent(*(interpreter, program, tmp_path), listen="127.0.0.1,vsock:18080") as agent,
    ):
        with pytest.raises(OSError, match="in use"):
            probe.bind((socket.VMADDR_CID_ANY, 18080))
        assert agent.get("/health").status == 200


def test_an_old_python_says_what_vsock_needs(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """CPython 2.7 and 3.6 cannot, and say so in one line; a busy door is one line, too."""
    if interpreter.name not in ("cpython-2.7.18", "cpython-3.6.15"):
        pytest.skip("this interpreter has vsock")
    run = run_to_end(interpreter, program, "--listen=vsock:18081", f"--config={tmp_path}/none")
    assert run.returncode == 1
    assert "vsock needs Python 3.7 or later" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("interpreter", list(find_cpythons())[-1:], indirect=True)
def test_doors_stay_open_after_root_is_given_up(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """curl, as root, gets through a Unix socket that root opened for an agent that is nobody."""
    path = tmp_path / "agent.sock"
    with running_agent(
        *(interpreter, program, tmp_path),
        listen=f"127.0.0.1,unix:{path}",
        arguments=["--user", "nobody"],
    ):
        argv = ["curl", "-sS", "--unix-socket", str(path), "http://guest/health"]
        done = subprocess.run(argv, capture_output=True, check=True, timeout=20)
    assert json.loads(done.stdout)["status"] == "healthy"
