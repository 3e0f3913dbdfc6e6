"""Machines on two hosts, each with a libvirt of its own, and injections on a Dask cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.batch.cluster import cluster_in
from tests.bench.measure import descendants
from tests.conftest import require
from tests.server.libvirt_host import (
    LibvirtHost,
    Server,
    libvirt_host,
    running,
    wait_until,
)
from vmprovision.appliance.snapshot.host import STOCK_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

HERE, THERE = "10.9.0.1", "10.9.0.2"
OTHER_SUBNET = "192.168.123"
PORT = 8081
# The other host has no KVM, other free memory, and a network whose guests can be reached.
OTHER_HOST = """
if [ -e /dev/kvm ]; then
    [ ! -e "$1/kvm" ] || umount /dev/kvm  # libvirt cannot move two mounts at one place
    mknod -m 600 "$1/no-kvm" c 1 3  # as /dev/null, which QEMU's user must not open
    mount --bind "$1/no-kvm" /dev/kvm
fi
mount --bind "$1/../meminfo" /proc/meminfo
sed -i "s|<forward/>|<forward mode='route'/>|" /etc/libvirt/qemu/networks/default.xml
"""
# What agents report to reaches the server's socket.
PROXY = """
import asyncio, sys

async def copy(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def connected(reader, writer):
    there = await asyncio.open_unix_connection(sys.argv[3])
    await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

async def main():
    server = await asyncio.start_server(connected, sys.argv[1], int(sys.argv[2]))
    await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture
def other(host: LibvirtHost, tmp_path: Path) -> Iterator[LibvirtHost]:
    """Return another private libvirt, with a cable between both hosts."""
    set_free_memory(tmp_path, 1)
    with libvirt_host(tmp_path / "other", subnet=OTHER_SUBNET, first=OTHER_HOST) as started:
        connect(host, started)
        yield started


def in_network(host: LibvirtHost, *command: str | Path) -> list[str]:
    """Return the command that runs one of this host's with the network of another one."""
    return ["nsenter", f"--target={host.init}", "--net", *map(str, command)]


def connect(host: LibvirtHost, other: LibvirtHost) -> None:
    """Put a cable between two hosts; the first one gets a route to the other's guests."""
    cable = "ip link add cable type veth peer name end"
    for each, command in (
        (host, f"{cable} netns {other.init}"),
        (host, f"ip address add {HERE}/24 dev cable"),
        (other, f"ip address add {THERE}/24 dev end"),
        (host, "ip link set cable up"),
        (other, "ip link set end up"),
        (host, f"ip route add {OTHER_SUBNET}.0/24 via {THERE}"),
    ):
        subprocess.run(in_network(each, *command.split()), check=True)


def set_free_memory(folder: Path, gigabytes: int) -> None:
    """Let the other host have so much free memory."""
    path = folder / "meminfo"
    path.touch()
    with path.open("r+", encoding="ascii") as file:  # the same file: it is mounted there
        file.truncate()
        total = f"MemTotal: {gigabytes << 20} kB\nMemFree: {gigabytes << 20} kB\n"
        file.write(f"{total}Buffers: 0 kB\nCached: 0 kB\n")


@contextlib.contextmanager
def proxy(server: Server) -> Iterator[str]:
    """Give an address that the guests of both hosts can report to."""
    command: list[str | Path] = [sys.executable, "-c", PROXY, HERE, str(PORT), server.socket]
    process = subprocess.Popen(in_network(server.host, *command))
    try:
        yield f"http://{HERE}:{PORT}"
    finally:
        process.kill()
        process.wait()


def test_a_machine_goes_to_the_host_with_most_memory(
    host: LibvirtHost, other: LibvirtHost, images: Path, tmp_path: Path
) -> None:
    """Each host runs what was put there, without KVM where libvirt has none; one may be away."""
    server = Server(host=host, state=tmp_path / "state", images=images)
    with proxy(server) as url:
        hosts = ["--host", host.uri, "--host", other.remote_uri]
        server.options = [*hosts, "--manager-url", url]
        with running(server):
            server.register("busybox", images / "busybox.qcow2")
            first = server.create("first")
            server.in_phase(first, "disk", "injected", "defined", "started", "reporting", "ready")
            set_free_memory(tmp_path, 1000)
            second = server.create("second")
            ready = [server.in_phase(vm_id, "ready") for vm_id in (first, second)]
            assert [vm["host"] for vm in ready] == [host.uri, other.remote_uri]
            assert (host.domains(), other.domains()) == ([first], [second])
            assert ready[1]["guest_ip"].startswith(f"{OTHER_SUBNET}.")
            assert "by TCG" in ready[1]["evidence"]["defined"]["detail"]
            with server.client() as client:
                for vm_id in (first, second):
                    assert client.get(f"/v1/vms/{vm_id}/metrics").status_code == 200
            other.run("sh", "-c", "kill -9 $(cat /run/libvirt/libvirtd.pid)")
            third = server.create("third")
            assert server.in_phase(third, "ready")["host"] == host.uri
            error = wait_until("the error", lambda: server.vm(second)["error"])
            assert error["exit_code"] == 91
            assert other.remote_uri in error["detail"]
            other.run("libvirtd", "-d", "-p", "/run/libvirt/libvirtd.pid")
            wait_until("no error", lambda: server.vm(second)["error"] is None)
            assert server.vm(second)["phase"] == "ready"
            server.delete(first, second, third)
            assert (host.domains(), other.domains()) == ([], [])
            assert list((server.state / "vms").iterdir()) == []


def test_a_cluster_injects(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """Dask's workers inject templates and VMs; a worker or the scheduler may be lost."""
    require(importlib.util.find_spec("distributed"), "distributed is not installed")
    with (
        cluster_in(tmp_path / "cluster", workers=0, enter=in_network(host)) as cluster,
        ThreadPoolExecutor(1) as pool,
    ):
        victim = cluster.add_worker({STOCK_VARIABLE: "1"})  # slow enough to be met at work
        options = ["--scheduler", cluster.address]
        server = Server(host=host, state=tmp_path / "state", images=images, options=options)
        with running(server):
            registered = pool.submit(server.register, "busybox", images / "busybox.qcow2")
            wait_until("its injection", lambda: registered.done() or has_machine(victim.pid))
            assert not registered.done()
            registered.result()
            ids = [server.create(f"vm-{number}") for number in range(2)]
            wait_until("an injection", lambda: has_machine(victim.pid))
            cluster.add_worker()
            victim.kill()
            victim.wait()
            for vm_id in ids:
                found = server.in_phase(vm_id, "ready")
                assert "operations verified" in found["evidence"]["injected"]["detail"]
            cluster.stop()
            late = server.create("late")
            error = wait_until("the error", lambda: unanswered(server.vm(late)["error"]))
            assert (error["exit_code"], error["status"]) == (90, 503)
            assert cluster.address in error["detail"]
            cluster.restart_scheduler()
            cluster.add_worker()
            server.in_phase(late, "ready")
            assert sorted(host.domains()) == sorted([*ids, late])
            server.delete(*ids, late)
            assert host.domains() == []
            assert list((server.state / "vms").iterdir()) == []


def test_a_cluster_without_workers(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """A VM says that it waits for a worker, at work or not, and goes on when one arrives."""
    require(importlib.util.find_spec("distributed"), "distributed is not installed")
    with cluster_in(tmp_path / "cluster", workers=0, enter=in_network(host)) as cluster:
        victim = cluster.add_worker({STOCK_VARIABLE: "1"})  # slow enough to be met at work
        options = ["--scheduler", cluster.address, "--jobs", "2"]
        server = Server(host=host, state=tmp_path / "state", images=images, options=options)
        with running(server):
            server.register("busybox", images / "busybox.qcow2")
            begun = server.create("begun")
            wait_until("an injection", lambda: has_machine(victim.pid))
            victim.kill()
            victim.wait()
            later = server.create("later")
            for vm_id in (begun, later):
                error = wait_until("the error", lambda vm_id=vm_id: server.vm(vm_id)["error"])
                assert error["detail"] == f"the scheduler at {cluster.address} has no workers"
                assert error["hint"].endswith(f"dask worker {cluster.address}")
                assert server.vm(vm_id)["phase"] == "disk"
            cluster.add_worker()
            for vm_id in (begun, later):
                found = server.in_phase(vm_id, "started", "reporting", "ready")
                assert found["error"] is None
            server.delete(begun, later)
            assert list((server.state / "vms").iterdir()) == []


def has_machine(process: int) -> bool:
    """Return whether a QEMU runs below a process."""
    for below in descendants(process):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{below}/comm").read_text().startswith("qemu-system"):
                return True
    return False


def unanswered(error: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return an error if it says that there is no scheduler."""
    return error if error and "no Dask scheduler answers" in error["detail"] else None
