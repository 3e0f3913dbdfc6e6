"""Guests into which nothing is injected: the service that ``inject`` prints, added and booted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import vmprovision
from tests.proof.booting import booted
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.proof.machine import MANAGER_URL, wait_for_http
from vmprovision.runtime.archive import build_archive

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.progress import Control

PROGRAM, SETTINGS = "/usr/local/bin/guest-agent", "/etc/guest-agent.conf"
SHEPHERD = "/etc/shepherd.scm"
OPTIONS = vmprovision.InjectOptions(vm_id="web-1", manager_url=MANAGER_URL)
LINES = ("PORT=8080", "VM_ID=web-1", f"MANAGER_URL={MANAGER_URL}")


def boot_printed_service(
    disk: Path, printed: str, *, seconds: float, control: Control
) -> tuple[dict[str, Any], float]:
    """Add the agent and the printed service to a guest, as a person would, and boot it.

    Args:
        disk: a qcow2 image with the root on its first partition and a boot loader.
        printed: what ``inject`` printed for it with ``OPTIONS``.
        seconds: how long the boot may take.
        control: progress and cancelling.

    Returns:
        What the agent answers to /info, and the seconds from power-on to its first answer.
    """
    assert all(f";;   {line}\n" in printed for line in LINES)
    with open_appliance([Drive(path=disk, format="qcow2")], control=control) as appliance:
        appliance.call("mount", "/dev/sda1", "/")
        appliance.call("mkdir_p", "/usr/local/bin")
        appliance.call("write", PROGRAM, build_archive().content)
        appliance.call("chmod", 0o755, PROGRAM)
        appliance.call("write", SETTINGS, "".join(f"{line}\n" for line in LINES).encode())
        appliance.call("write_append", SHEPHERD, printed.encode())
        appliance.call("umount_all")
    begun = time.monotonic()
    with booted(disk, control=control, seconds=seconds + 60) as (machine, listener):
        deadline = begun + seconds
        health = wait_for_http(f"{machine.agent_url}/health", deadline, machine)
        took = time.monotonic() - begun
        assert health["status"] == "healthy"
        (report, *_) = listener.wait_for_reports(1, deadline=deadline, check=machine.check)
        assert report.path == "/v1/vms/web-1/guest-ip"
        information = wait_for_http(f"{machine.agent_url}/info", deadline, machine)
    return information, took
