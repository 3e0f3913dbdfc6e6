"""Many machines from one template: twenty requested at once, and a hundred."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.libvirt_host import LibvirtHost, Server, running
from vmprovision.server.steps import BOOT_SECONDS, BOOTS_AT_ONCE

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

WAVES, AT_ONCE = 5, 20
LARGEST_OVERLAY = 2 << 20  # before the boot


def assert_boots_take_turns(vms: list[dict[str, Any]]) -> None:
    """Check that without KVM no more machines booted at once than its processors can bear."""
    if "by KVM" in vms[0]["evidence"]["defined"]["detail"]:
        return
    begun, ended = (
        [datetime.fromisoformat(vm["evidence"][phase]["at"].replace("Z", "+00:00")) for vm in vms]
        for phase in ("started", "ready")
    )
    slow = timedelta(seconds=BOOT_SECONDS)  # such a boot holds up no other
    for now in begun:
        booting = [
            begin
            for begin, end in zip(begun, ended, strict=True)
            if begin <= now < min(end, begin + slow)
        ]
        assert len(booting) <= BOOTS_AT_ONCE * (os.cpu_count() or 1)


def test_twenty_machines_at_once(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """Of twenty that are requested in parallel all answer, and none is twice there."""
    with (
        running(Server(host=host, state=tmp_path / "state", images=images)) as server,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        server.register("busybox", images / "busybox.qcow2")
        ids = set(pool.map(server.create, [f"vm-{number}" for number in range(AT_ONCE)]))
        assert len(ids) == AT_ONCE
        ready = [server.in_phase(vm_id, "ready") for vm_id in ids]
        assert len({vm["guest_ip"] for vm in ready}) == AT_ONCE
        assert_boots_take_turns(ready)
        assert set(host.domains()) == ids
        server.delete(*ids)
        assert host.domains() == []


def test_a_hundred_machines(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """Each has a small disk before it boots; the template stays as it was, and nothing is left.

    They are stopped before they boot.
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
            for vm_id in ids:
                assert client.post(f"/v1/vms/{vm_id}/stop").status_code == 202
            for vm_id in ids:
                disk = server.state / "vms" / vm_id / "disk.qcow2"
                server.in_phase(vm_id, "defined")
                assert 0 < disk.stat().st_blocks * 512 < LARGEST_OVERLAY
            assert set(host.domains()) == ids
            server.delete(*ids)
            assert host.domains() == []
            assert list((server.state / "vms").iterdir()) == []
        assert hashlib.sha256(base.read_bytes()).hexdigest() == before
