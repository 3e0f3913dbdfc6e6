"""Twenty machines from one template, requested at once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.libvirt_host import LibvirtHost, Server, running
from vmprovision.server.steps import BOOT_SECONDS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

AT_ONCE = 20


def assert_boots_take_turns(vms: list[dict[str, Any]]) -> None:
    """Check that without KVM no more machines booted at once than this host has processors."""
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
        assert len(booting) <= (os.cpu_count() or 1)


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
