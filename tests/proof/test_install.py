"""``guest-agent install`` and ``uninstall``, run by guests that boot."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.proof.booting import booted
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.progress import Control
from vmprovision.proof.machine import wait_for_http
from vmprovision.runtime.archive import build_archive

from .test_machine import BOOT_SECONDS, overlay, recipe_image

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.appliance.session import Appliance

pytestmark = [pytest.mark.appliance, pytest.mark.boot]

DONE = "the order was carried out and is on the disk"
ORDER = f"""#!/bin/sh
/root/guest-agent {{word}} >/root/said 2>&1
echo $? >>/root/said
sync
echo {DONE} >/dev/ttyS0
"""
UNIT = """\
[Service]
Type=oneshot
ExecStart=/root/order
[Install]
WantedBy=multi-user.target
"""
INITTAB = "\nord:2:once:/root/order\n"


def information_of(disk: Path, log: Path, said: str = "") -> dict[str, Any]:
    """Return what /info says after a boot of the disk itself, and after this was said there.

    Args:
        disk: the guest's.
        log: gets what the guest says on its console.
        said: on the console.
    """
    deadline = time.monotonic() + BOOT_SECONDS
    with booted(disk, console_log=log) as (machine, _):
        information = wait_for_http(f"{machine.agent_url}/info", deadline, machine)
        while said.encode() not in log.read_bytes():  # it may be later than the agent's answer
            machine.check()
            assert time.monotonic() < deadline, f"nobody said: {said}"
            time.sleep(0.2)
        return information


def prepare(appliance: Appliance, init: str) -> None:
    """Put the agent's one file into the guest, as scp would, and an order for the next boot."""
    appliance.call("write", "/root/guest-agent", build_archive().content)
    appliance.call("chmod", 0o755, "/root/guest-agent")
    appliance.call("write", "/root/order", ORDER.format(word="install").encode())
    appliance.call("chmod", 0o755, "/root/order")
    if init == "systemd":
        appliance.call("write", "/etc/systemd/system/order.service", UNIT.encode())
        wants = "/etc/systemd/system/multi-user.target.wants"
        appliance.call("mkdir_p", wants)
        appliance.call("ln_s", "/etc/systemd/system/order.service", f"{wants}/order.service")
    else:
        appliance.call("write_append", "/etc/inittab", INITTAB.encode())


@pytest.mark.parametrize("init", ["systemd", pytest.param("sysvinit", marks=pytest.mark.slow)])
def test_an_agent_installs_itself(init: str, tmp_path: Path) -> None:
    """It runs under the guest's own init system at once, and by itself after the next boot."""
    disk = overlay(recipe_image(f"debian-12-{init}"), tmp_path / "disk.qcow2")
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda1", "/")
        prepare(appliance, init)
        appliance.call("umount_all")
    first = information_of(disk, tmp_path / "first.log", DONE)
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda1", "/")
        said = appliance.call("cat", "/root/said")
        assert said.startswith("guest-agent: installed ("), said
        assert said.endswith("\n0\n")
        appliance.call("write", "/root/order", b"#!/bin/sh\n")
        appliance.call("umount_all")
    second = information_of(disk, tmp_path / "second.log")
    for information in (first, second):
        running = information["init"]
        if init == "systemd":
            assert running["cgroup"] == "/system.slice/guest-agent.service"
        else:
            assert (running["pid1"], running["parent"]["comm"]) == ("init", "guest-agent")
