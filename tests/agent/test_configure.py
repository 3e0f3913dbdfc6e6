"""What ``POST /configure-interface`` does, in network namespaces with real interfaces."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import require, require_root
from vmprovision.agent import configure

from .agents import parse_response, receive_all, running_agent, stop
from .interpreters import one_of_each
from .test_process import write_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from .interpreters import Interpreter

    Ask = Callable[..., tuple[int, dict[str, Any]]]

TOKEN = "t0k3n"
ENABLED = "ALLOW_CONFIGURE=yes\nTOKEN=t0k3n\n"
ONE_OF_EACH = pytest.mark.parametrize("interpreter", one_of_each(), indirect=True)
# eth0 is the guest's interface, and its other end is on the outside.
IP = shutil.which("ip") or "/sbin/ip"
SETUP = (
    f"{IP} link set lo up; {IP} link add eth0 type veth peer name outside && "
    f"{IP} link set outside up && mount -t sysfs none /sys && "
)


def exchange(path: Path, body: str, token: str | None = TOKEN) -> tuple[int, dict[str, Any]]:
    """Return the status and the answer to an order that goes through a Unix socket."""
    lines = ["POST /configure-interface HTTP/1.1", "Host: guest", "Connection: close"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    lines += [f"Content-Length: {len(body)}", "", body]
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        sock.sendall("\r\n".join(lines).encode())
        response = parse_response(receive_all(sock))
    answer: dict[str, Any] = json.loads(response.body)
    return response.status, answer


class Guest:
    """An agent in a network namespace of its own."""

    def __init__(self, folder: Path, pid: int) -> None:
        """Keep the process that holds the namespace."""
        self.path = folder / "agent.sock"
        self._enter = ("nsenter", f"--target={pid}", "--net")

    def order(self, **wanted: str | None) -> dict[str, Any]:
        """Return the answer to an order that is allowed."""
        status, answer = exchange(self.path, json.dumps(wanted))
        assert status == 200
        return answer

    def run(self, *argv: str) -> str:
        """Return what a program says in the namespace."""
        command = [*self._enter, *argv]
        return subprocess.run(
            command, capture_output=True, check=True, text=True, timeout=20
        ).stdout


def find_busybox() -> str:
    """Return the path of busybox; skip the test if it is not installed."""
    busybox = shutil.which("busybox") or ""
    require(busybox, "busybox is not installed")
    return busybox


@contextmanager
def running_guest(
    interpreter: Interpreter,
    program: Path,
    folder: Path,
    *,
    config: str = ENABLED,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Guest]:
    """Return an agent in a network namespace with an interface; reached through a Unix socket."""
    require_root()
    probe = ["unshare", "-nm", "sh", "-c", SETUP + "true"]
    tried = subprocess.run(probe, check=False, capture_output=True)
    require(tried.returncode == 0, "this host allows no network namespaces", optional=True)
    folder.mkdir(exist_ok=True)
    (folder / "agent.conf").write_text(config)
    argv = [*interpreter.argv, str(program), "--config", f"{folder}/agent.conf"]
    argv += ["--listen", f"unix:{folder}/agent.sock"]
    with (folder / "stderr").open("wb") as stderr:
        run = subprocess.Popen(
            ["unshare", "-nm", "sh", "-c", SETUP + 'exec "$@"', "sh", *argv],
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            env={**os.environ, **(environment or {})},
        )
    try:
        deadline = time.monotonic() + 20
        while "listening on" not in (folder / "stderr").read_text():
            assert time.monotonic() < deadline, (folder / "stderr").read_text()
            time.sleep(0.05)
        yield Guest(folder, run.pid)
    finally:
        stop(run)


@ONE_OF_EACH
def test_an_address_is_set(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """The interface has the address and the route, and after a second order only the new ones."""
    with running_guest(interpreter, program, tmp_path) as guest:
        answer = guest.order(interface="eth0", static_ip="10.7.0.5/24", gateway="10.7.0.1")
        assert answer == {
            "success": True,
            "interface": "eth0",
            "mode": "static",
            "ip": "10.7.0.5/24",
            "gateway": "10.7.0.1",
        }
        assert "10.7.0.5/24" in guest.run("ip", "-4", "addr", "show", "dev", "eth0")
        assert "via 10.7.0.1 dev eth0" in guest.run("ip", "route")
        # of the same network: the kernel lets the second one go with the first
        guest.order(interface="eth0", static_ip="10.7.0.6/24", gateway="10.7.0.2")
        shown = guest.run("ip", "-4", "addr", "show", "dev", "eth0")
        assert "10.7.0.6/24" in shown
        assert "10.7.0.5" not in shown
        assert guest.run("ip", "route").count("default") == 1
        assert "via 10.7.0.2 dev eth0" in guest.run("ip", "route")
        answer = guest.order(interface="eth0", static_ip="fd00:7::5/64", gateway="fd00:7::1")
        assert answer["success"]
        assert "fd00:7::5/64" in guest.run("ip", "-6", "addr", "show", "dev", "eth0")
        assert "10.7.0.6/24" in guest.run("ip", "-4", "addr", "show", "dev", "eth0")


@ONE_OF_EACH
@pytest.mark.parametrize("tools", ["busybox ip", "ifconfig"])
def test_old_tools_set_an_address(
    interpreter: Interpreter, program: Path, tmp_path: Path, tools: str
) -> None:
    """The ip of busybox does, and ifconfig with route where there is no ip at all."""
    busybox = find_busybox()
    for name in ("ip", "ifconfig", "route"):
        missing = name == "ip" and tools == "ifconfig"
        script = "exit 127\n" if missing else f'exec {busybox} {name} "$@"\n'
        write_command(tmp_path / "bin", name, script)
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    with running_guest(interpreter, program, tmp_path, environment=environment) as guest:
        answer = guest.order(interface="eth0", static_ip="10.7.0.5/20", gateway="10.7.0.1")
        assert answer["success"], answer
        assert "10.7.0.5/20" in guest.run("ip", "-4", "addr", "show", "dev", "eth0")
        assert "via 10.7.0.1 dev eth0" in guest.run("ip", "route")


@ONE_OF_EACH
def test_an_address_is_leased(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """Without static_ip a DHCP client asks; here that of busybox asks that of busybox."""
    busybox = find_busybox()
    set_address = '[ "$1" != bound ] || ip addr add $ip/$mask dev $interface\n'
    write_command(tmp_path / "bin", "lease", set_address)
    udhcpc = f'exec {busybox} udhcpc -f -q -s {tmp_path}/bin/lease "$@"\n'
    write_command(tmp_path / "bin", "udhcpc", udhcpc)
    for name in ("dhclient", "dhcpcd"):
        write_command(tmp_path / "bin", name, "exit 127\n")
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    (tmp_path / "leases").touch()
    (tmp_path / "udhcpd.conf").write_text(
        "start 10.7.0.50\nend 10.7.0.50\ninterface outside\noption subnet 255.255.255.0\n"
        f"lease_file {tmp_path}/leases\npidfile {tmp_path}/udhcpd.pid\n"
    )
    with running_guest(interpreter, program, tmp_path, environment=environment) as guest:
        guest.run("ip", "addr", "add", "10.7.0.1/24", "dev", "outside")
        enter = guest._enter  # noqa: SLF001 -- the server must not be waited for
        server = subprocess.Popen([*enter, busybox, "udhcpd", "-f", f"{tmp_path}/udhcpd.conf"])
        try:
            answer = guest.order(interface="eth0")
        finally:
            stop(server)
        expected = {"success": True, "interface": "eth0", "mode": "dhcp", "dhcp_client": "udhcpc"}
        assert answer == expected
        assert "10.7.0.50" in guest.run("ip", "-4", "addr", "show", "dev", "eth0")


@ONE_OF_EACH
def test_wrong_orders_change_nothing(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """An invalid interface, address or gateway is refused with a message."""
    with running_guest(interpreter, program, tmp_path) as guest:
        before = guest.run("ip", "addr")
        for wanted, word in (
            ({"interface": "eth9"}, "no interface"),
            ({"interface": "../eth0"}, "not the name"),
            ({"interface": "-h"}, "not the name"),
            ({}, "not the name"),
            ({"interface": "eth0", "static_ip": "10.7.0.5"}, "static_ip"),
            ({"interface": "eth0", "static_ip": "10.7.0.5/33"}, "static_ip"),
            ({"interface": "eth0", "static_ip": "127.0.0.1/8"}, "static_ip"),
            ({"interface": "eth0", "static_ip": "$(reboot)/8"}, "static_ip"),
            ({"interface": "eth0", "static_ip": "10.7.0.5/24", "gateway": "fd00::1"}, "gateway"),
            ({"interface": "eth0", "gateway": "10.7.0.1"}, "static_ip"),
        ):
            answer = guest.order(**wanted)
            assert answer["success"] is False
            assert word in answer["error"]
        for body in ("", "[]", "{", '{"interface":1}', '{"a":"b"} x', "{'a':'b'}", '{"a"', '{"a":'):
            assert exchange(guest.path, body)[1]["success"] is False
        assert guest.run("ip", "addr") == before


@pytest.mark.parametrize(
    ("config", "token", "status"),
    [
        ("", "t0k3n", 403),
        ("TOKEN=t0k3n\n", "t0k3n", 403),
        ("ALLOW_CONFIGURE=yes\n", "t0k3n", 403),
        (ENABLED, None, 401),
        (ENABLED, "t0k3", 401),
        (ENABLED + "READ_TOKEN=r3ad\n", "r3ad", 401),
    ],
)
@ONE_OF_EACH
def test_strangers_change_nothing(  # noqa: PLR0913, PLR0917 -- fixtures and cases
    interpreter: Interpreter,
    program: Path,
    tmp_path: Path,
    config: str,
    token: str | None,
    status: int,
) -> None:
    """It takes the setting and the token; a reader's token does not do."""
    listen = f"unix:{tmp_path}/agent.sock,127.0.0.1"
    with running_agent(interpreter, program, tmp_path, config=config, listen=listen) as agent:
        body = '{"interface":"none"}'
        assert exchange(tmp_path / "agent.sock", body, token)[0] == status
        assert agent.run.poll() is None


@ONE_OF_EACH
def test_others_are_served_while_an_order_is_carried_out(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """A slow DHCP client holds up nobody; a second order must wait; who leaves stops nothing."""
    script = f"touch {tmp_path}/begun; sleep 2; touch {tmp_path}/ended\n"
    write_command(tmp_path / "bin", "dhclient", script)
    write_command(tmp_path / "bin", "ip", "exit 0\n")
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    path = tmp_path / "agent.sock"
    with running_agent(
        *(interpreter, program, tmp_path),
        config=ENABLED,
        listen=f"127.0.0.1,unix:{path}",
        environment=environment,
    ) as agent:
        body = '{"interface":"lo"}'
        head = f"POST /configure-interface HTTP/1.1\r\nHost: g\r\nContent-Length: {len(body)}\r\n"
        with agent.connect() as slow:
            slow.sendall(f"{head}Authorization: Bearer t0k3n\r\n\r\n{body}".encode())
            deadline = time.monotonic() + 10
            while not (tmp_path / "begun").exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            before = time.monotonic()
            assert agent.get("/health").status == 200
            assert exchange(path, body)[0] == 503
            assert time.monotonic() - before < 1
        agent.await_log('"dhcp_client":"dhclient"')
        assert (tmp_path / "ended").exists()
        assert agent.get("/health").status == 200


@ONE_OF_EACH
@pytest.mark.parametrize("old", ["10.7.0.5/24", "10.8.0.5/16"])
def test_what_fails_leaves_everything_as_it_was(
    interpreter: Interpreter, program: Path, tmp_path: Path, old: str
) -> None:
    """An unusable gateway, and a route that is refused at any time, take no address away."""
    write_command(
        tmp_path / "bin",
        "ip",
        f'case "$*" in *"route replace default via 10.7.0.9"*) '
        f'[ -e {tmp_path}/good ] || exit 2; rm {tmp_path}/good;; esac\nexec {IP} "$@"\n',
    )
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    with running_guest(interpreter, program, tmp_path, environment=environment) as guest:
        guest.run("ip", "link", "set", "dev", "eth0", "up")
        guest.run("ip", "addr", "add", old, "brd", "+", "dev", "eth0")
        guest.run("ip", "addr", "add", "fd00:7::5/64", "dev", "eth0", "nodad")
        guest.run("ip", "route", "add", "default", "via", old[:6] + ".1", "metric", "7")
        guest.run("ip", "route", "add", "192.0.2.0/24", "via", old[:6] + ".2")

        def state() -> list[str]:
            shown = guest.run("ip", "addr", "show", "dev", "eth0") + guest.run("ip", "route")
            shown += guest.run("ip", "-6", "route", "show", "default")
            return sorted(line.strip() for line in shown.splitlines() if "fe80" not in line)

        before = state()
        for address, gateway in (
            ("10.7.0.6/24", "192.0.2.1"),
            ("10.7.0.6/24", "10.7.0.6"),
            ("10.7.0.6/24", "10.7.0.255"),
            ("10.7.0.6/24", "10.7.0.0"),
            ("10.7.0.6/32", "10.7.0.1"),
            ("10.7.0.6/24", "10.7.0.9"),
            ("10.7.0.5/24", "10.7.0.9"),
            ("fd00:7::6/64", "fd00:8::1"),
            ("fd00:7::6/64", "fd00:7:0::6"),
        ):
            for is_late in (False, True):
                (tmp_path / "good").unlink(missing_ok=True)
                if is_late:
                    (tmp_path / "good").touch()
                answer = guest.order(interface="eth0", static_ip=address, gateway=gateway)
                assert answer["success"] is False, answer
                assert ("gateway" in answer["error"]) is (gateway != "10.7.0.9")
                assert state() == before, (address, gateway, is_late)


@ONE_OF_EACH
def test_what_fails_with_old_tools(interpreter: Interpreter, program: Path, tmp_path: Path) -> None:
    """Also where there is no ip: the old address and the old route come back."""
    busybox = find_busybox()
    write_command(tmp_path / "bin", "ip", "exit 127\n")
    write_command(tmp_path / "bin", "ifconfig", f'exec {busybox} ifconfig "$@"\n')
    refusal = 'case "$*" in *"add default gw 10.7.0.9"*) exit 1;; esac\n'
    write_command(tmp_path / "bin", "route", refusal + f'exec {busybox} route "$@"\n')
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    with running_guest(interpreter, program, tmp_path, environment=environment) as guest:
        for static_ip, gateway in (("10.7.0.5/20", "10.7.0.1"), ("10.7.0.5/20", "10.7.0.1")):
            answer = guest.order(interface="eth0", static_ip=static_ip, gateway=gateway)
            assert answer["success"], answer
        before = guest.run("ip", "-4", "addr", "show", "dev", "eth0") + guest.run("ip", "route")
        for gateway in ("192.0.2.1", "10.7.0.9"):
            answer = guest.order(interface="eth0", static_ip="10.7.0.6/24", gateway=gateway)
            assert answer["success"] is False
            shown = guest.run("ip", "-4", "addr", "show", "dev", "eth0")
            assert shown + guest.run("ip", "route") == before


@ONE_OF_EACH
@pytest.mark.parametrize("name", ["del", "inet", "inet6", "dev", "src"])
def test_interfaces_with_odd_names(
    interpreter: Interpreter, program: Path, tmp_path: Path, name: str
) -> None:
    """A name that is also a word of ip's is a name."""
    with running_guest(interpreter, program, tmp_path) as guest:
        guest.run("ip", "link", "set", "dev", "eth0", "down")
        guest.run("ip", "link", "set", "dev", "eth0", "name", name)
        for address in ("10.7.0.5/24", "10.7.0.6/24", "10.8.0.6/24"):
            answer = guest.order(interface=name, static_ip=address, gateway=address[:6] + ".1")
            assert answer["success"], answer
            shown = guest.run("ip", "-4", "addr", "show", "dev", name)
            assert shown.count("inet 10.") == shown.count(f"inet {address} ") == 1
        answer = guest.order(interface=name, static_ip="10.9.0.6/24", gateway="10.7.0.1")
        assert answer["success"] is False


def test_json_that_is_understood() -> None:
    """Objects as any client writes them, with whatever else there is in them."""
    text = ' {"a" : "b","c":null , "interface":"eth0"}\n'
    assert configure.parse_object(text) == {"a": "b", "c": None, "interface": "eth0"}
    assert configure.parse_object("{}") == {}
    text = r'{"a":"\u0065\u0054h\/0\"\\\n\ud83d\ude00","b":[{"c":[]},-0.5e+3,[true]],"d":{"a":0}}'
    found = configure.parse_object(text)
    assert found["a"] == 'eTh/0"\\\n??'
    assert set(found) == {"a", "b", "d"}


def test_json_is_what_the_standard_library_takes() -> None:
    """Randomly changed JSON is accepted exactly if Python's own parser accepts it."""
    rng = random.Random(4)
    whole = r'{"interface": "e\u0074h0", "x": [[], true, null, {"y": ""}], "static_ip": null}'
    understood = 0
    for _ in range(20000):
        text = list(whole)
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randrange(3)] = rng.choice(["", *'{}[]:,"\\tn \t\n\x01ua'])
        try:
            expected = json.loads("".join(text), parse_constant=refuse)
        except ValueError:
            expected = None
        if not isinstance(expected, dict):
            with pytest.raises(configure.RefusalError):
                configure.parse_object("".join(text))
            continue
        found = configure.parse_object("".join(text))
        assert set(found) == set(expected)
        strings = [key for key in found if isinstance(expected[key], str) or expected[key] is None]
        if all(str(expected[key]).isascii() for key in strings):
            assert [found[key] for key in strings] == [expected[key] for key in strings]
        understood += 1
    assert understood > 1000


def refuse(constant: str) -> None:
    """Fail for NaN and infinities, which Python accepts and JSON does not have."""
    raise ValueError(constant)


@pytest.mark.parametrize(
    "text",
    ["", "{", "}", '{"a"}', '{"a":}', '{"a":"b",}', '{"a":"b"}{', '{"a":{}', '{a:"b"}', "[" * 4000],
)
def test_json_that_is_refused(text: str) -> None:
    """Whatever else there is."""
    with pytest.raises(configure.RefusalError):
        configure.parse_object(text)
