"""The guest's address in network namespaces with real interfaces, as rtnetlink(7) tells it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require

from .test_process import ONE_OF_EACH, write_command

if TYPE_CHECKING:
    from pathlib import Path

    from .interpreters import Interpreter


def card(name: str, *addresses: str) -> str:
    """Return the commands that make an interface with a carrier."""
    made = f"ip link add {name} type veth peer name p-{name}; ip link set p-{name} up\n"
    made += f"ip link set {name} up\n"
    return made + "".join(f"ip addr add {address} dev {name}\n" for address in addresses)


ETH0 = card("eth0", "10.9.0.4/24")
LOOPBACK = "ip link set lo up; ip addr add 10.0.0.1/32 dev lo\n"
SITUATIONS = {
    "one": (ETH0, "10.9.0.4"),
    "none": ("ip link set lo up\n", "none"),
    "host-address": (LOOPBACK + card("eth0", "10.9.0.4/32"), "10.9.0.4, 10.0.0.1"),
    "loopback": (LOOPBACK + ETH0, "10.9.0.4, 10.0.0.1"),
    "loopback-only": (LOOPBACK, "10.0.0.1"),
    "tunnel": (
        f"ip tuntap add x0 mode tun; ip link set x0 up; ip addr add 10.0.0.1/24 dev x0\n{ETH0}",
        "10.9.0.4, 10.0.0.1",
    ),
    "named-as-a-tunnel": (card("wg0", "10.0.0.1/24") + ETH0, "10.9.0.4, 10.0.0.1"),
    "load-balancer": (card("kube-ipvs0", "10.0.0.1/32") + ETH0, "10.9.0.4, 10.0.0.1"),
    "down": (
        f"ip link add other0 type veth peer name b; ip addr add 10.0.0.1/24 dev other0\n{ETH0}",
        "10.9.0.4, 10.0.0.1",
    ),
    "no-carrier": (
        (
            "ip link add other0 type veth peer name b; ip link set other0 up\n"
            "ip addr add 10.0.0.1/24 dev other0\n"
            f"ip route add default via 10.0.0.2 dev other0\n{ETH0}"
        ),
        "10.9.0.4, 10.0.0.1",
    ),
    "two-routes": (
        (
            f"{ETH0}{card('eth1', '10.8.0.1/24')}ip route add default dev eth0 metric 9\n"
            "ip route add default dev eth1 metric 5\n"
        ),
        "10.8.0.1, 10.9.0.4",
    ),
    "vpn-is-the-way-out": (
        f"{ETH0}{card('wg0', '10.0.0.1/24')}ip route add default dev wg0\n",
        "10.0.0.1, 10.9.0.4",
    ),
    "peer": (card("eth0", "10.9.0.4 peer 10.9.0.5"), "10.9.0.4"),
    "clat": (
        (
            f"{card('clat', '192.0.0.1/32')}ip route add default dev clat\n"
            f"{card('eth0')}ip addr add 2001:db8::7/64 dev eth0 nodad\n"
        ),
        "2001:db8::7, 192.0.0.1",
    ),
    "ipv6": (f"{card('eth0')}ip addr add 2001:0db8:0:0::0007/64 dev eth0 nodad\n", "2001:db8::7"),
}


def addresses_in(interpreter: Interpreter, program: Path, folder: Path, situation: str) -> str:
    """Return the addresses that an agent logs in a namespace prepared by these commands."""
    for name in ("ip", "ifconfig"):
        write_command(folder / "bin", name, f"touch {folder}/started; exit 1\n")
    start = (
        f"set -e\n{situation}PATH={folder}/bin:$PATH\n"
        'exec "$@" --listen unix:/proc/self/cwd/sock --config /nonexistent\n'
    )
    argv = ["unshare", "-n", "sh", "-c", start, "sh", *interpreter.argv, str(program)]
    with (folder / "log").open("wb") as log:
        run = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 20
        while not (found := re.search(r" info: addresses: (.*)", (folder / "log").read_text())):
            assert run.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
    finally:
        run.kill()
        run.wait()
    assert not (folder / "started").exists(), "a program was started"
    return found[1]


def may_make_namespaces() -> bool:
    """Return whether this user may make network namespaces."""
    return subprocess.run(["unshare", "-n", "true"], check=False).returncode == 0


def test_the_kernel_tells_the_addresses(
    interpreter: Interpreter, program: Path, tmp_path: Path
) -> None:
    """Every interpreter asks by rtnetlink, without a program, and knows which interface is real."""
    require(os.geteuid() == 0 and may_make_namespaces(), "only root can make namespaces")
    situation, expected = SITUATIONS["host-address"]
    assert addresses_in(interpreter, program, tmp_path, situation) == expected


@pytest.mark.parametrize("name", sorted(SITUATIONS))
@ONE_OF_EACH
def test_the_best_address_of_a_situation(
    interpreter: Interpreter, program: Path, tmp_path: Path, name: str
) -> None:
    """The address at which others reach the guest comes first."""
    require(os.geteuid() == 0 and may_make_namespaces(), "only root can make namespaces")
    situation, expected = SITUATIONS[name]
    found = addresses_in(interpreter, program, tmp_path, situation)
    assert found == expected
