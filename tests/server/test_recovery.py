"""What survives what: the server killed in every phase, libvirtd killed, guests that are silent."""

from __future__ import annotations

import signal
import statistics
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

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

MADE = 20
SECONDS_TO_START = 3.0


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


def create(server: Server, name: str) -> str:
    """Create a VM; return its id."""
    with server.client() as client:
        made = client.post("/v1/vms", json={"name": name, "template_id": "busybox"})
        assert made.status_code == 202, made.text
        return str(made.json()["id"])


def delete(server: Server, vm_id: str) -> None:
    """Delete a VM, and wait until it is gone."""
    with server.client() as client:
        client.delete(f"/v1/vms/{vm_id}")
        wait_until("the end", lambda: client.get(f"/v1/vms/{vm_id}").status_code == 404)


def test_a_server_killed_in_every_phase(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """Started again each time, it ends with one ready VM, and after a delete with nothing."""
    options = ["--lease-seconds", "2"]
    server = Server(host=host, state=tmp_path / "state", images=images, options=options)
    with running(server):
        server.register("busybox", images / "busybox.qcow2")
        vm_id = create(server, "x")
        kept = ["requested", "disk", "injected", "defined", "started", "reporting", "ready"]
        seen = []
        while kept:
            phase = server.in_phase(vm_id, *kept)["phase"]
            seen.append(phase)
            kept = kept[kept.index(phase) + 1 :]
            server.end(signal.SIGKILL)
            server.start()
        assert seen[-1] == "ready"
        assert len(seen) > 3
        with server.client() as client:
            assert client.get(f"/v1/vms/{vm_id}/metrics").status_code == 200
        assert host.domains() == [vm_id]
        with server.client() as client:
            client.delete(f"/v1/vms/{vm_id}")
        server.end(signal.SIGKILL)
        server.start()
        with server.client() as client:
            wait_until("the end", lambda: client.get(f"/v1/vms/{vm_id}").status_code == 404)
        assert host.domains() == []
        assert list((server.state / "vms").iterdir()) == []


def test_libvirtd_is_killed(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """The VM lives on, the server says what is wrong, and then all is as before."""
    with running(Server(host=host, state=tmp_path / "state", images=images)) as server:
        server.register("busybox", images / "busybox.qcow2")
        vm_id = create(server, "x")
        server.in_phase(vm_id, "ready")
        host.run("sh", "-c", "kill -9 $(cat /run/libvirt/libvirtd.pid)")
        error = wait_until("the error", lambda: server.vm(vm_id)["error"])
        assert error["exit_code"] == 91
        assert server.vm(vm_id)["phase"] == "ready"
        with server.client() as client:
            assert client.get(f"/v1/vms/{vm_id}/metrics").json()["uptime_seconds"] > 0
            assert client.post(f"/v1/vms/{vm_id}/stop").status_code == 202
        host.run("libvirtd", "-d", "-p", "/run/libvirt/libvirtd.pid")
        stopped = server.in_phase(vm_id, "defined")
        assert (stopped["state"], stopped["error"]) == ("stopped", None)
        delete(server, vm_id)
        assert host.domains() == []


def test_two_servers_one_killed(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """On one database the other server finishes what the killed one began."""
    options = ["--lease-seconds", "2"]
    state = tmp_path / "state"
    first = Server(host=host, state=state, images=images, options=options, name="first")
    second = Server(host=host, state=state, images=images, options=options, name="second")
    with running(first), running(second):
        first.register("busybox", images / "busybox.qcow2")
        ids = [create(first, f"vm-{number}") for number in range(3)]
        first.in_phase(ids[0], "disk", "injected", "defined", "started", "reporting")
        first.end(signal.SIGKILL)
        for vm_id in ids:
            second.in_phase(vm_id, "ready")
        assert sorted(host.domains()) == sorted(ids)
        for vm_id in ids:
            delete(second, vm_id)
        assert host.domains() == []


def test_a_silent_guest(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """Without a report in time it is silent, with its console; when it reports, it is ready.

    A machine that ends before its agent reports is silent as well.
    """
    options = ["--report-timeout", "4"]
    server = Server(host=host, state=tmp_path / "state", images=images, options=options)
    with running(server):
        server.register("busybox", images / "busybox.qcow2")
        vm_id = create(server, "late")
        found = server.in_phase(vm_id, "silent", "ready")
        assert (found["phase"], found["state"]) == ("silent", "failed")
        assert found["error"]["console"]
        assert found["error"]["hint"]
        wait_until("the report", lambda: server.vm(vm_id)["phase"] == "ready")
        host.run("virsh", "--quiet", "destroy", vm_id)
        assert server.in_phase(vm_id, "defined", "silent")["state"] == "stopped"
        delete(server, vm_id)
        other = create(server, "ended")
        server.in_phase(other, "started", "reporting", "silent")
        host.run("virsh", "--quiet", "destroy", other)
        ended = server.in_phase(other, "silent")
        assert ended["state"] == "failed"
        delete(server, other)


def test_what_creating_costs(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """From the row to a started domain, the median of twenty; and the base is as it was."""
    with running(Server(host=host, state=tmp_path / "state", images=images)) as server:
        template_id = server.register("busybox", images / "busybox.qcow2")
        base = server.state / "templates" / template_id / "image"
        before = base.stat()
        seconds = []
        for number in range(MADE):
            vm_id = create(server, f"vm-{number}")
            found = server.in_phase(vm_id, "started", "reporting", "ready")
            times = (found["evidence"]["started"]["at"], found["created_at"])
            started, created = (
                datetime.fromisoformat(time.replace("Z", "+00:00")) for time in times
            )
            seconds.append((started - created).total_seconds())
            delete(server, vm_id)
        after = base.stat()
        assert (after.st_mtime_ns, after.st_uid, after.st_mode) == (
            before.st_mtime_ns,
            before.st_uid,
            before.st_mode,
        )
        print(f"median {statistics.median(seconds):.2f} s, largest {max(seconds):.2f} s")  # noqa: T201 -- pytest -s shows it
        assert statistics.median(seconds) < SECONDS_TO_START
