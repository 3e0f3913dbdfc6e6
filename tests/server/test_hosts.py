"""Machines on two hosts, each with a libvirt of its own, and injections on a Dask cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.batch.cluster import cluster_in
from tests.conftest import require
from tests.server.libvirt_host import (
    LibvirtHost,
    Server,
    let_others_enter,
    libvirt_host,
    running,
    wait_until,
)
from vmprovision.progress import Control
from vmprovision.recipe import build_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

HERE, THERE = "10.9.0.1", "10.9.0.2"
OTHER_SUBNET = "192.168.123"
PORT = 8081
# The other host has no KVM, other free memory, and a network whose guests can be reached.
OTHER_HOST = """
mount --bind /dev/null /dev/kvm 2>/dev/null || true
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
def images(tmp_path: Path) -> Path:
    """Return a folder with an image of the smallest guest."""
    folder = tmp_path / "images"
    folder.mkdir()
    build_image("busybox-standalone", output=folder / "busybox.qcow2", control=Control())
    return folder


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LibvirtHost]:
    """Return a private libvirt."""
    let_others_enter(tmp_path)  # QEMU has a user of its own
    with libvirt_host(tmp_path / "host") as started:
        yield started


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


def create(server: Server, name: str) -> str:
    """Create a VM; return its id."""
    with server.client() as client:
        made = client.post("/v1/vms", json={"name": name, "template_id": "busybox"})
        assert made.status_code == 202, made.text
        return str(made.json()["id"])


def delete(server: Server, *ids: str) -> None:
    """Delete VMs, and wait until they are gone."""
    with server.client() as client:
        for vm_id in ids:
            client.delete(f"/v1/vms/{vm_id}")
        wait_until("the end", lambda: client.get("/v1/vms").json()["items"] == [])


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
            first = create(server, "first")
            server.in_phase(first, "disk", "injected", "defined", "started", "reporting", "ready")
            set_free_memory(tmp_path, 1000)
            second = create(server, "second")
            ready = [server.in_phase(vm_id, "ready") for vm_id in (first, second)]
            assert [vm["host"] for vm in ready] == [host.uri, other.remote_uri]
            assert (host.domains(), other.domains()) == ([first], [second])
            assert ready[1]["guest_ip"].startswith(f"{OTHER_SUBNET}.")
            assert "by TCG" in ready[1]["evidence"]["defined"]["detail"]
            with server.client() as client:
                for vm_id in (first, second):
                    assert client.get(f"/v1/vms/{vm_id}/metrics").status_code == 200
            other.run("sh", "-c", "kill -9 $(cat /run/libvirt/libvirtd.pid)")
            third = create(server, "third")
            assert server.in_phase(third, "ready")["host"] == host.uri
            error = wait_until("the error", lambda: server.vm(second)["error"])
            assert error["exit_code"] == 91
            assert other.remote_uri in error["detail"]
            other.run("libvirtd", "-d", "-p", "/run/libvirt/libvirtd.pid")
            wait_until("no error", lambda: server.vm(second)["error"] is None)
            assert server.vm(second)["phase"] == "ready"
            delete(server, first, second, third)
            assert (host.domains(), other.domains()) == ([], [])
            assert list((server.state / "vms").iterdir()) == []


def test_a_cluster_injects(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """Dask's workers inject, another one takes over from one that is killed, and all are ready."""
    require(importlib.util.find_spec("distributed"), "distributed is not installed")
    with cluster_in(tmp_path / "cluster", workers=2, enter=in_network(host)) as cluster:
        options = ["--scheduler", cluster.address]
        server = Server(host=host, state=tmp_path / "state", images=images, options=options)
        with running(server):
            server.register("busybox", images / "busybox.qcow2")
            ids = [create(server, f"vm-{number}") for number in range(4)]
            server.in_phase(ids[0], "injected", "defined", "started", "reporting", "ready")
            cluster.processes[1].kill()
            for vm_id in ids:
                found = server.in_phase(vm_id, "ready")
                assert "operations verified" in found["evidence"]["injected"]["detail"]
            assert sorted(host.domains()) == sorted(ids)
            delete(server, *ids)
            assert host.domains() == []
