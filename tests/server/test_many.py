"""A hundred machines from one template, twenty requested at once."""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.libvirt_host import LibvirtHost, Server, running

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

WAVES, AT_ONCE = 5, 20
LARGEST_OVERLAY = 2 << 20  # before the boot


def assert_overlay_is_small(vm: dict[str, Any]) -> None:
    """Check the size that a VM's disk had when the agent was in it."""
    detail = vm["evidence"]["injected"]["detail"]
    (size,) = re.findall(r"the disk has (\d+) bytes", detail)
    assert 0 < int(size) < LARGEST_OVERLAY, detail


def test_a_hundred_machines(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """None is lost, the template stays as it was, and nothing is left of any.

    All of the first twenty answer. The others are deleted when they have started.
    """
    seen: set[str] = set()
    with (
        running(Server(host=host, state=tmp_path / "state", images=images)) as server,
        ThreadPoolExecutor(AT_ONCE) as pool,
        server.client() as client,
    ):
        template_id = server.register("busybox", images / "busybox.qcow2")
        base = server.state / "templates" / template_id / "image"
        before = hashlib.sha256(base.read_bytes()).hexdigest()
        for wave in range(WAVES):
            ids = set(pool.map(server.create, [f"vm-{wave}-{n}" for n in range(AT_ONCE)]))
            assert len(ids - seen) == AT_ONCE
            seen |= ids
            assert {vm["id"] for vm in client.get("/v1/vms").json()["items"]} == ids
            if wave == 0:
                for vm_id in ids:
                    server.in_phase(vm_id, "ready")
                assert set(host.domains()) == ids
            for vm_id in ids:
                assert_overlay_is_small(server.in_phase(vm_id, "started", "reporting", "ready"))
                client.delete(f"/v1/vms/{vm_id}")
            server.delete(*ids)
        assert host.domains() == []
        assert list((server.state / "vms").iterdir()) == []
        assert hashlib.sha256(base.read_bytes()).hexdigest() == before
