"""An OSTree system that ostree(1) itself deployed: booted, upgraded by itself, booted again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.trees import Mount, Sight, look_into
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.progress import Control
from vmprovision.proof.machine import MANAGER_URL, BootSource, boot
from vmprovision.proof.report_listener import ReportListener

from .test_machine import overlay, recipe_image

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

SECONDS = 900.0
SOURCE = vmprovision.ImageOptions(format="qcow2", allow_backing=True)
DEPLOYMENTS = "/ostree/deploy/debian/deploy"
# A newer commit with another release file, deployed by the running guest.
UPGRADE = b"""\
#!/bin/sh -e
mkdir -p /var/newer/usr/lib
sed 's/^VERSION_ID=.*/VERSION_ID="13.99"/' /usr/lib/os-release >/var/newer/usr/lib/os-release
ostree commit --repo=/ostree/repo --branch=debian/13 --owner-uid=0 --owner-gid=0 \
    --tree=ref=debian/13 --tree=dir=/var/newer
ostree admin deploy debian/13
"""
UNIT = b"""\
[Unit]
After=guest-agent.service
SuccessAction=poweroff
FailureAction=poweroff
[Service]
Type=oneshot
ExecStart=/bin/sh /etc/upgrade.sh
StandardOutput=file:/dev/ttyS0
StandardError=inherit
"""


def test_the_agent_answers_in_a_deployment_and_in_the_next_one(tmp_path: Path) -> None:
    """The guest's own ``ostree admin deploy`` merges /etc; what boots next is the new one."""
    disk = overlay(recipe_image("debian-13-ostree"), tmp_path / "disk.qcow2")
    sight = Sight(path=disk, format="qcow2", mounts=[Mount(device="1")])
    before = look_into(sight, tmp_path)
    options = vmprovision.InjectOptions(vm_id="web-1", manager_url=MANAGER_URL)
    guest = vmprovision.inject(disk, options, source=SOURCE).guest
    assert (guest.init.system, guest.distribution.version) == ("systemd", "13")
    require_answer(disk, "ostree-1")

    upgraded = overlay(disk, tmp_path / "upgraded.qcow2")
    upgrade(upgraded, tmp_path / "console.log")
    assert vmprovision.inspect(upgraded, source=SOURCE).distribution.version == "13.99"
    assert vmprovision.verify(upgraded, source=SOURCE).mismatches == ()
    require_answer(upgraded, "ostree-2")

    vmprovision.remove(disk, source=SOURCE)
    assert look_into(sight, tmp_path) == before


def require_answer(disk: Path, entry: str) -> None:
    """Prove the guest by a boot of the entry that boot loaders would choose."""
    proof = vmprovision.prove(disk, vmprovision.ProofOptions(timeout=SECONDS), source=SOURCE)
    assert proof.booted_by == f"own kernel (entry {entry})"
    assert proof.information["vm_id"] == "web-1"
    assert proof.information["init"]["cgroup"] == "/system.slice/guest-agent.service"


def upgrade(disk: Path, log: Path) -> None:
    """Boot the guest with a unit that upgrades it, and wait until it has powered itself off."""
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda1", "/")
        (etc,) = appliance.call("glob_expand", f"{DEPLOYMENTS}/*.0/etc")
        units = f"{etc}/systemd/system"
        appliance.call("write", f"{etc}/upgrade.sh", UPGRADE)
        appliance.call("write", f"{units}/upgrade.service", UNIT)
        link = f"{units}/multi-user.target.wants/upgrade.service"
        appliance.call("ln_s", "/etc/systemd/system/upgrade.service", link)
        appliance.call("umount_all")
    deadline = time.monotonic() + SECONDS
    with (
        ReportListener() as listener,
        boot(
            Drive(path=disk, format="qcow2"),
            source=BootSource(),
            agent_port=8080,
            manager=listener.address,
            control=Control(),
            seconds=SECONDS + 60,
            console_log=log,
        ) as machine,
    ):
        while machine.is_running():
            assert time.monotonic() < deadline, log.read_text("utf-8", "replace")[-2000:]
            time.sleep(0.5)
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda1", "/")
        # the new deployment has the unit, too, and would upgrade and power off again
        for etc in appliance.call("glob_expand", f"{DEPLOYMENTS}/*/etc"):
            appliance.call("rm_f", f"{etc}/systemd/system/multi-user.target.wants/upgrade.service")
        assert len(appliance.call("glob_expand", f"{DEPLOYMENTS}/*.0")) == 2
        appliance.call("umount_all")
