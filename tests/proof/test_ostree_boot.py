"""An OSTree system that ostree(1) itself deployed: booted, upgraded by itself, booted again."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

import pytest

import vmprovision
from tests.image.trees import Mount, Sight, look_into
from tests.proof.booting import booted
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.progress import Control

from .test_machine import overlay, recipe_image

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

SECONDS = 900.0
SOURCE = vmprovision.ImageOptions(format="qcow2", allow_backing=True)
# A commit with a newer release and another host name, which the running guest deploys.
UPGRADE = """\
[Service]
Type=oneshot
ExecStart=/bin/sh -exc '\
mkdir -p /var/newer/usr/lib /var/newer/usr/etc; \
sed "s/^VERSION_ID=.*/VERSION_ID=13.99/" /usr/lib/os-release >/var/newer/usr/lib/os-release; \
echo newer >/var/newer/usr/etc/hostname; \
ostree commit --repo=/ostree/repo --branch=debian/13 --owner-uid=0 --owner-gid=0 \
    --tree=ref=debian/13 --tree=dir=/var/newer; \
ostree admin deploy debian/13'
StandardOutput=journal+console
[Unit]
After=guest-agent.service
SuccessAction=poweroff
FailureAction=poweroff
"""


def test_the_agent_answers_in_a_deployment_and_in_the_next_one(tmp_path: Path) -> None:
    """The guest's own ``ostree admin deploy`` merges /etc, and its menu starts the new one."""
    disk = overlay(recipe_image("debian-13-ostree"), tmp_path / "disk.qcow2")
    sight = Sight(path=disk, format="qcow2", mounts=[Mount(device="1")])
    before = look_into(sight, tmp_path)
    injected = vmprovision.inject(disk, vmprovision.InjectOptions(vm_id="web-1"), source=SOURCE)
    assert injected.guest.init.system == "systemd"
    old = prove(disk)
    assert (old["os"]["version_id"], old["hostname"]) == ("13", "debian")

    upgraded = overlay(disk, tmp_path / "upgraded.qcow2")
    upgrade(upgraded, tmp_path / "console.log")
    assert vmprovision.verify(upgraded, source=SOURCE).mismatches == ()
    new = prove(upgraded)
    assert (new["os"]["version_id"], new["hostname"]) == ("13.99", "newer")
    for what in ("vm_id", "identity", "version"):
        assert new[what] == old[what]
    vmprovision.remove(upgraded, source=SOURCE)
    assert vmprovision.inspect(upgraded, source=SOURCE).agent is None

    vmprovision.remove(disk, source=SOURCE)
    assert look_into(sight, tmp_path) == before


def test_a_deployment_without_a_boot_loader_is_started_by_its_entry(tmp_path: Path) -> None:
    """A host may load the kernel of an image itself; only the entry names the deployment."""
    disk = overlay(recipe_image("debian-13-ostree"), tmp_path / "disk.qcow2")
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("pwrite_device", "/dev/sda", bytes(440), 0)
    vmprovision.inject(disk, vmprovision.InjectOptions(vm_id="web-1"), source=SOURCE)
    prove(disk, "own kernel (entry ostree-1)")


def prove(disk: Path, by: str = "boot loader (syslinux)") -> dict[str, Any]:
    """Boot a copy of the guest, usually by its own boot loader; return its agent's facts."""
    proof = vmprovision.prove(disk, vmprovision.ProofOptions(timeout=SECONDS), source=SOURCE)
    assert proof.booted_by == by
    assert proof.information["vm_id"] == "web-1"
    assert proof.information["init"]["cgroup"] == "/system.slice/guest-agent.service"
    return proof.information


def upgrade(disk: Path, log: Path) -> None:
    """Boot the guest, which upgrades and then ends itself; nothing on its disk tells it to."""
    credentials = {
        "systemd.extra-unit.upgrade.service": UPGRADE,
        "systemd.unit-dropin.multi-user.target": "[Unit]\nWants=upgrade.service\n",
    }
    firmware = []
    for name, content in credentials.items():
        encoded = base64.b64encode(content.encode()).decode()
        value = f"type=11,value=io.systemd.credential.binary:{name}={encoded}"
        firmware += ["-smbios", value]
    deadline = time.monotonic() + SECONDS
    with booted(disk, console_log=log, firmware=firmware) as (machine, _):
        while machine.is_running():
            assert time.monotonic() < deadline, machine.console_tail(40)
            time.sleep(0.5)
