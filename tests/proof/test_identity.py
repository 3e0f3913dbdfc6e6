"""One injected image, started as several machines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

import vmprovision
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.progress import Control
from vmprovision.proof.machine import (
    MANAGER_URL,
    BootSource,
    boot,
    wait_for_http,
)
from vmprovision.proof.report_listener import ReportListener
from vmprovision.recipe import find_recipe

from .test_machine import BOOT_SECONDS, download, overlay, recipe_image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = [pytest.mark.appliance, pytest.mark.boot]

UUID = "6f0c4a3e-91d2-4b57-8d1e-2c5b7a90e1f3"


def start_clone(
    golden: Path, clone: Path, source: BootSource, firmware: Sequence[str] = ()
) -> tuple[str, dict[str, Any]]:
    """Start a clone; return the path of its first report and the identity in it."""
    deadline = time.monotonic() + BOOT_SECONDS
    with (
        ReportListener() as listener,
        boot(
            Drive(path=overlay(golden, clone), format="qcow2"),
            source=source,
            agent_port=8080,
            manager=listener.address,
            control=Control(),
            firmware=firmware,
        ) as machine,
    ):
        reports = listener.wait_for_reports(1, deadline=deadline, check=machine.check)
        information = wait_for_http(f"{machine.agent_url}/info", deadline, machine)
    identity: dict[str, Any] = information["identity"]
    return reports[0].path, identity


def test_clones_of_a_systemd_guest_have_names_of_their_own(
    fresh_debian: Path, tmp_path: Path
) -> None:
    """SMBIOS names one and its UUID the other; the agent, never root there, knows both."""
    vmprovision.inject(fresh_debian)
    manager = f"guest_agent.manager_url={MANAGER_URL}"
    fw_cfg = f"name=opt/guest_agent.manager_url,string={MANAGER_URL}"
    firmware = ["-smbios", "type=11,value=guest_agent.vm_id=web-1", "-fw_cfg", fw_cfg]
    path, identity = start_clone(fresh_debian, tmp_path / "1.qcow2", BootSource(), firmware)
    assert path == "/v1/vms/web-1/guest-ip"
    assert identity == {
        "vm_id": {"value": "web-1", "source": "SMBIOS OEM string"},
        "manager_url": {"value": MANAGER_URL, "source": "fw_cfg"},
    }
    credential = f"type=11,value=io.systemd.credential:{manager}"
    firmware = ["-uuid", UUID, "-smbios", credential]
    path, identity = start_clone(fresh_debian, tmp_path / "2.qcow2", BootSource(), firmware)
    assert path == f"/v1/vms/{UUID}/guest-ip"
    assert identity == {
        "vm_id": {"value": UUID, "source": "SMBIOS UUID"},
        "manager_url": {"value": MANAGER_URL, "source": "systemd credential"},
    }


def test_the_kernel_command_line_names_a_busybox_guest(tmp_path: Path) -> None:
    """A direct kernel boot, as Firecracker's, needs nothing but its command line."""
    golden = overlay(recipe_image("busybox-standalone"), tmp_path / "golden.qcow2")
    options = vmprovision.ImageOptions(format="qcow2", allow_backing=True)
    vmprovision.inject(golden, source=options)
    with open_appliance([Drive(path=golden, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount_ro", "/dev/sda", "/")
        kernel = download(appliance, "/boot/vmlinuz-*", tmp_path / "kernel")
        initrd = download(appliance, "/boot/initrd.img-*", tmp_path / "initrd")
    line = find_recipe("busybox-standalone").disk.command_line
    line += f" guest_agent.vm_id=fc-1 guest_agent.manager_url={MANAGER_URL}"
    source = BootSource(kernel=kernel, initrd=initrd, command_line=line)
    path, identity = start_clone(golden, tmp_path / "1.qcow2", source)
    assert path == "/v1/vms/fc-1/guest-ip"
    assert {each["source"] for each in identity.values()} == {"kernel command line"}
