"""Clones of one cloud image, each with a seed of its own; cloud-init works beside the agent."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

import vmprovision
from vmprovision.appliance.session import Drive
from vmprovision.progress import Control
from vmprovision.proof.machine import MANAGER_URL, BootSource, boot, wait_for_http
from vmprovision.proof.prove import metric_faults
from vmprovision.proof.report_listener import ReportListener
from vmprovision.seed.iso import make_iso

from .test_machine import overlay, recipe_image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vmprovision.proof.machine import Machine
    from vmprovision.proof.report_listener import Report

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

SECONDS = 1200.0  # cloud-init is much Python: without KVM, on a loaded host
POLL_SECONDS = 2.0
IMAGE = vmprovision.ImageOptions(format="qcow2", allow_backing=True)
ADDRESS = "10.0.2.15"
CLOUD_IMAGE = "debian-13-cloud-ext4"
UUID = "6f0c4a3e-91d2-4b57-8d1e-2c5b7a90e1f3"
MARK = "the-clone:"
# cloud-init's last stage goes on only after the agent listens, so both work at the same time
HOLD = "until (: </dev/tcp/127.0.0.1/8080); do sleep 1; done 2>/dev/null; sleep 15"
# systemctl(1) counts in microseconds since the kernel's start
TELL = f"""\
until [ -e /run/cloud-init/result.json ]; do sleep 1; done
at() {{ systemctl show --value --property "$2TimestampMonotonic" "$1.service"; }}
printf '\\n{MARK}{{"machine_id": "%s", "hostname": "%s", "restarts": %s, "agent": %s,\
 "first_stage": %s, "seeded": %s, "last_stage": %s, "ended": %s}}\\n' \
"$(cat /etc/machine-id)" "$(cat /proc/sys/kernel/hostname)" \
"$(systemctl show --value --property NRestarts guest-agent.service)" \
"$(at guest-agent ActiveEnter)" "$(at cloud-init-main InactiveExit)" \
"$(at cloud-init-network ActiveEnter)" "$(at cloud-final InactiveExit)" \
"$(at cloud-final ActiveEnter)" >/dev/ttyS0
"""
# systemd.system-credentials(7); cloud-init's first stages end before sysinit.target
FIRST_OF_ALL = b"""\
[Unit]
DefaultDependencies=no
Before=cloud-init-main.service
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What was seen of a clone's first boot.

    Attributes:
        first: the agent's first answer to ``GET /info``.
        last: the same, after cloud-init had ended.
        guest: what the guest itself wrote on its console then.
        reports: all that the manager got.
    """

    first: dict[str, Any]
    last: dict[str, Any]
    guest: dict[str, Any]
    reports: tuple[Report, ...]


@pytest.fixture(scope="module")
def cloud_image() -> Path:
    """Return the cloud image that all clones come from."""
    return recipe_image(CLOUD_IMAGE)


def make_seed(name: str, folder: Path) -> Path:
    """Write a NoCloud seed with a host name and an instance ID; return its path."""
    tell = ["systemd-run", "--no-block", "sh", "-c", TELL]
    user_data = {"runcmd": [tell, ["bash", "-c", HOLD]]}
    files = {
        "meta-data": {"instance-id": f"iid-{name}", "local-hostname": f"host-{name}"},
        "user-data": user_data,
    }
    content = {key: json.dumps(value).encode() for key, value in files.items()}
    content["user-data"] = b"#cloud-config\n" + content["user-data"]
    seed = folder / f"{name}.iso"
    seed.write_bytes(make_iso("cidata", content))
    return seed


def start_clone(disk: Path, seed: Path, firmware: Sequence[str] = ()) -> Boot:
    """Boot a clone by its own GRUB, and watch its agent until cloud-init has ended."""
    deadline = time.monotonic() + SECONDS
    log = disk.with_suffix(".log")
    with (
        ReportListener() as listener,
        boot(
            Drive(path=disk, format="qcow2"),
            source=BootSource(display=True),
            agent_port=8080,
            manager=listener.address,
            control=Control(),
            seconds=SECONDS + 60,
            console_log=log,
            firmware=[*firmware, "-drive", f"file={seed},format=raw,if=virtio,readonly=on"],
        ) as machine,
    ):
        first = wait_for_http(f"{machine.agent_url}/info", deadline, machine)
        assert read_mark(log) is None, "the agent answers while cloud-init is at work"
        guest = wait_for_end(machine, log, deadline)
        listener.wait_for_reports(1, deadline=deadline, check=machine.check)
        last = wait_for_http(f"{machine.agent_url}/info", deadline, machine)
    return Boot(first=first, last=last, guest=guest, reports=listener.reports())


def wait_for_end(machine: Machine, log: Path, deadline: float) -> dict[str, Any]:
    """Return what the guest writes after cloud-init; until then its metrics must be right."""
    while (told := read_mark(log)) is None:
        metrics = wait_for_http(f"{machine.agent_url}/metrics", deadline, machine)
        assert metric_faults(metrics) == []
        assert time.monotonic() < deadline, "cloud-init has not ended"
        time.sleep(POLL_SECONDS)
    metrics = wait_for_http(f"{machine.agent_url}/metrics", deadline, machine)
    assert metric_faults(metrics) == []
    return told


def read_mark(log: Path) -> dict[str, Any] | None:
    """Return what the guest has written of itself on its console, if it has."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        _, mark, rest = line.partition(MARK)
        if mark and rest.endswith("}"):
            told: dict[str, Any] = json.loads(rest)
            return told
    return None


def test_clones_with_seeds_differ(cloud_image: Path, tmp_path: Path) -> None:
    """Each has its own VM ID, host name and machine-id, and keeps them while cloud-init works."""
    seen: dict[str, Boot] = {}
    for name in ("web-1", "web-2"):
        disk = overlay(cloud_image, tmp_path / f"{name}.qcow2")
        options = vmprovision.InjectOptions(vm_id=name, manager_url=MANAGER_URL)
        vmprovision.inject(disk, options, source=IMAGE)
        seen[name] = start_clone(disk, make_seed(name, tmp_path))
    for name, clone in seen.items():
        for answer in (clone.first, clone.last):
            assert (answer["vm_id"], answer["hostname"]) == (name, f"host-{name}")
        assert clone.last["addresses"] == [ADDRESS, *clone.last["addresses"][1:]]
        assert {each.path for each in clone.reports} == {f"/v1/vms/{name}/guest-ip"}
        assert clone.reports[-1].body == {"guest_ip": ADDRESS}
        told = clone.guest
        assert (told["hostname"], told["restarts"]) == (f"host-{name}", 0)
        # cloud-init had begun before the agent, and ended after it
        assert told["first_stage"] < told["seeded"] < told["agent"] < told["ended"]
    assert len({clone.guest["machine_id"] for clone in seen.values()}) == len(seen)
    assert all(len(clone.guest["machine_id"]) == 32 for clone in seen.values())


def test_cloud_init_names_a_clone_whose_agent_was_there_first(
    cloud_image: Path, tmp_path: Path
) -> None:
    """The agent starts before cloud-init; it reports as the seed names it, never by the UUID."""
    disk = overlay(cloud_image, tmp_path / "web-3.qcow2")
    options = vmprovision.InjectOptions(manager_url=MANAGER_URL)
    vmprovision.inject(disk, options, source=IMAGE)
    drop_in = base64.b64encode(FIRST_OF_ALL).decode("ascii")
    credential = f"io.systemd.credential.binary:systemd.unit-dropin.guest-agent.service={drop_in}"
    firmware = ["-uuid", UUID, "-smbios", f"type=11,value={credential}"]
    clone = start_clone(disk, make_seed("web-3", tmp_path), firmware)
    told = clone.guest
    assert told["agent"] < told["first_stage"] < told["seeded"] < told["ended"]
    assert told["restarts"] == 0
    assert clone.first["vm_id"] in (None, "iid-web-3")
    assert clone.last["hostname"] == told["hostname"] == "host-web-3"
    assert clone.last["identity"]["vm_id"] == {"value": "iid-web-3", "source": "cloud-init"}
    assert {each.path for each in clone.reports} == {"/v1/vms/iid-web-3/guest-ip"}
    assert clone.reports[-1].body == {"guest_ip": ADDRESS}
