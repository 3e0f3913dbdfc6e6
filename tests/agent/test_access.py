"""Who may ask the agent, and on which listen addresses."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require, require_root
from vmprovision.agent import access, compat, config

from .agents import Response, parse_response, receive_all, running_agent, stop
from .interpreters import find_cpythons, one_of_each
from .test_addresses import may_make_namespaces
from .test_process import run_to_end
from .test_pure import Collect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .agents import Agent
    from .interpreters import Interpreter


def ask(agent: Agent, *fields: str) -> Response:
    """Return what the agent answers to GET /metrics with these header fields."""
    lines = ["GET /metrics HTTP/1.1", "Host: guest", "Connection: close", *fields]
    return parse_response(agent.exchange("\r\n".join([*lines, "", ""]).encode()))


def ask_on_path(path: Path) -> Response:
    """Return what the agent answers on a Unix socket."""
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
        ("192.0.2.1", "192.0.2.3", False),
        ("10.0.0.0/8, 2001:db8::/33", "10.255.0.1", True),
        ("10.0.0.0/8, 2001:db8::/33", "2001:db8:7fff::1", True),
        ("10.0.0.0/8, 2001:db8::/33", "2001:db8:8000::1", False),
        ("192.0.2.1/31", "192.0.2.0", True),
        ("192.0.2.1/31", "192.0.2.3", False),
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
    """An invalid restriction does not let everybody in."""
    collect = Collect()
    settings = config.parse_settings([("ALLOW", allow), ("READ_TOKEN", "a b")], collect)
    assert not access.is_allowed(settings.allow, compat.pack_address("10.0.0.1"))
    assert not access.shows([b"Bearer a b"], settings.read_token)
    assert len(collect.lines) == 2
    assert settings.read_token is not None


GUEST = """set -e
ip link set lo up
ip link add eth0 type veth peer name p0
ip link set p0 netns $0
ip addr add 10.9.0.1/24 dev eth0
ip addr add 10.9.0.4/24 dev eth0
ip addr add fd09::1/64 dev eth0 nodad
ip link set eth0 up
ip addr add fe80::9/64 dev eth0 nodad
exec "$@"
"""
NEIGHBOUR = """set -e
ip addr add 10.9.0.2/24 dev p0
ip addr add 10.9.0.3/24 dev p0
ip addr add fd09::2/64 dev p0 nodad
ip link set p0 up
"""
CLIENT = """import socket, sys, time
deadline = time.monotonic() + 20
source = (sys.argv[2], 0) if sys.argv[2] else None
while True:
    try:
        sock = socket.create_connection((sys.argv[1], 8080), 10, source)
        break
    except ConnectionRefusedError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.05)
try:
    sock.sendall(b"GET /health HTTP/1.0\\r\\n\\r\\n")
    print(sock.makefile("rb").read().decode(), end="")
except ConnectionError:
    pass
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """The processes whose network namespaces are those of a guest and of a machine beside it."""

    guest: int
    other: int

    def ask(self, address: str, source: str, *, from_guest: bool = False) -> str:
        """Return what an agent answers to a client with this address; empty if it refuses."""
        argv = ["nsenter", "-n", "-t", str(self.guest if from_guest else self.other)]
        argv += [sys.executable, "-c", CLIENT, address, source]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout


@contextmanager
def neighbours(
    interpreter: Interpreter, program: Path, folder: Path, config: str
) -> Iterator[Neighbours]:
    """Yield an agent on port 8080 of a guest that is connected to another machine."""
    require(os.geteuid() == 0 and may_make_namespaces(), "only root can make namespaces")
    (folder / "agent.conf").write_text(config)
    agent = [*interpreter.argv, str(program), "--config", str(folder / "agent.conf")]
    with ExitStack() as stack, (folder / "log").open("wb") as log:
        other = subprocess.Popen(["unshare", "-n", "sleep", "300"])
        stack.callback(stop, other)
        here = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{other.pid}/ns/net").readlink() == here:
            time.sleep(0.02)
        argv = ["unshare", "-n", "sh", "-c", GUEST, str(other.pid), *agent]
        guest = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log)
        stack.callback(stop, guest)
        enter = ["nsenter", "-n", "-t", str(other.pid)]
        show = [*enter, "ip", "link", "show", "p0"]
        while subprocess.run(show, capture_output=True, check=False).returncode:
            assert guest.poll() is None, (folder / "log").read_text()
            time.sleep(0.02)
        subprocess.run([*enter, "sh", "-c", NEIGHBOUR], check=True)
        found = Neighbours(guest=guest.pid, other=other.pid)
        assert "200 OK" in found.ask("127.0.0.1", "127.0.0.1", from_guest=True)
        yield found


def test_strangers_are_turned_away(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """A peer outside ALLOW is disconnected without an answer; a peer in it is served."""
    with neighbours(interpreter, program, tmp_path, "ALLOW=10.9.0.3 203.0.113.7\n") as pair:
        assert pair.ask("10.9.0.1", "10.9.0.2") == ""
        assert pair.ask("fd09::1", "fd09::2") == ""
        assert "200 OK" in pair.ask("10.9.0.1", "10.9.0.3")
        assert "ALLOW does not name" in (tmp_path / "log").read_text()


def test_the_guest_itself_always_may(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Over each of its own addresses, a link-local one and from one to another included."""
    ways = [(each, "") for each in ("10.9.0.1", "fd09::1", "fe80::9%eth0", "127.0.0.1", "::1")]
    ways.append(("10.9.0.1", "10.9.0.4"))
    with neighbours(interpreter, program, tmp_path, "ALLOW=203.0.113.7\n") as pair:
        for address, source in ways:
            assert "200 OK" in pair.ask(address, source, from_guest=True), (address, source)
        assert pair.ask("10.9.0.4", "10.9.0.3") == ""


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


# --- listen addresses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        *("unix:", "unix:relative", "unix:/a:9", "unix:/a:1777", "unix:/" + "x" * 107),
        *("vsock:", "vsock:x", "vsock:1:2:3", "vsock:4294967296"),
        *("a/b", "127.0.0.1,http://x"),
    ],
)
def test_invalid_listen_addresses(value: str) -> None:
    """A list with one wrong address is refused as a whole."""
    with pytest.raises(ValueError, match=r"has a|is not"):
        config.parse_listen(value)


def test_a_unix_socket_is_a_door(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """It has the mode that was asked for, and stands beside an address."""
    path = tmp_path / "agent.sock"
    listen = f"unix:{path}:0600,127.0.0.1"  # in this order: the second is waited for
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
        probe = None
    require(probe, "this host's kernel has no vsock", optional=True)
    assert probe is not None
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
    """CPython 2.7 and 3.6 cannot, and say so in one line; a busy address is one line, too."""
    old = interpreter.name in ("cpython-2.7.18", "cpython-3.6.15")
    require(old, "this interpreter has vsock", optional=True)
    run = run_to_end(interpreter, program, "--listen=vsock:18081", f"--config={tmp_path}/none")
    assert run.returncode == 1
    assert "vsock needs Python 3.7 or later" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("interpreter", list(find_cpythons())[-1:], indirect=True)
def test_listeners_stay_open_after_dropping_root(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """curl, as root, gets through a Unix socket that root opened for an agent that is nobody."""
    require_root()
    path = tmp_path / "agent.sock"
    with running_agent(
        *(interpreter, program, tmp_path),
        listen=f"127.0.0.1,unix:{path}",
        arguments=["--user", "nobody"],
    ):
        argv = ["curl", "-sS", "--unix-socket", str(path), "http://guest/health"]
        done = subprocess.run(argv, capture_output=True, check=True, timeout=20)
    assert json.loads(done.stdout)["status"] == "healthy"
