"""The whole line, with a real libvirt and a real guest: from a request to the agent's answer."""

from __future__ import annotations

import hashlib
import json
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

pytestmark = [pytest.mark.appliance, pytest.mark.boot]

LARGEST_OVERLAY = 2 << 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an image of the smallest guest."""
    folder = tmp_path_factory.mktemp("images")
    build_image("busybox-standalone", output=folder / "busybox.qcow2", control=Control())
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LibvirtHost]:
    """Return a private libvirt."""
    with libvirt_host(tmp_path_factory.mktemp("libvirt") / "host") as started:
        yield started


@pytest.fixture
def server(host: LibvirtHost, images: Path, tmp_path: Path) -> Iterator[Server]:
    """Return a server that runs."""
    let_others_enter(tmp_path)  # QEMU has a user of its own
    with running(Server(host=host, state=tmp_path / "state", images=images)) as started:
        yield started


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_from_a_request_to_the_agent(server: Server, images: Path) -> None:
    """One VM by one key; its agent is the one that answers; and nothing is left of it."""
    image = images / "busybox.qcow2"
    before = digest(image)
    template_id = server.register("busybox", image)
    base = server.state / "templates" / template_id / "image"
    prepared = digest(base)
    body = {"name": "test-vm", "template_id": "busybox"}
    with server.client() as client:
        made = [
            client.post("/v1/vms", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2)
        ]
        assert [answer.status_code for answer in made] == [202, 202]
        (vm_id,) = {answer.json()["id"] for answer in made}
        disk = server.state / "vms" / vm_id / "disk.qcow2"
        server.in_phase(vm_id, "injected", "defined", "started", "reporting", "ready")
        assert disk.stat().st_blocks * 512 < LARGEST_OVERLAY
        found = client.get(f"/v1/vms/{vm_id}?wait=agent&timeout=600").json()["item"]
        assert (found["phase"], found["state"]) == ("ready", "running"), json.dumps(found)
        assert list(found["evidence"])[-1] == "ready"
        assert server.host.domains() == [vm_id]
        # the same agent, asked by the server and by a neighbour of the guest
        direct = server.host.run("curl", "-sf", f"http://{found['guest_ip']}:8080/metrics")
        passed_on = client.get(f"/v1/vms/{vm_id}/metrics").json()
        assert passed_on.keys() == json.loads(direct).keys()
        assert passed_on["memory_total_kb"] == json.loads(direct)["memory_total_kb"]
        text = client.get(f"/v1/vms/{vm_id}/metrics", headers={"Accept": "text/plain"}).text
        assert f'guest_agent_machine_info{{vm_id="{vm_id}"}} 1' in text
        (target,) = client.get("/v1/sd").json()
        assert target["targets"] == [f"{found['guest_ip']}:8080"]
        samples = wait_until("a sample", lambda: client.get(f"/v1/metrics/vms/{vm_id}").json())
        assert samples[0]["memory_total_kb"] == passed_on["memory_total_kb"]
        # what guests can reach is not the API
        status = ("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}")
        assert server.host.run(*status, "http://192.168.122.1:8080/v1/vms") == "404"
        assert client.delete(f"/v1/vms/{vm_id}").status_code == 202
        wait_until("the end", lambda: client.get(f"/v1/vms/{vm_id}").status_code == 404)
    assert server.host.domains() == []
    assert list((server.state / "vms").iterdir()) == []
    assert (digest(image), digest(base)) == (before, prepared)
