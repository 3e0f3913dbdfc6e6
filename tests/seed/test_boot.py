"""A boot with a seed: an untouched image of a guest with cloud-init starts the agent."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from tests.proof.booting import booted
from tests.proof.test_prove import digest
from vmprovision import InjectOptions, SeedOptions, make_seed
from vmprovision.progress import Control
from vmprovision.proof.machine import MANAGER_URL, wait_for_http
from vmprovision.recipe import build_image

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.boot

BOOT_SECONDS = 900.0  # cloud-init is much Python: without KVM, on a loaded host
OWN_DATA = b"#cloud-config\nruncmd: [[sh, -c, 'echo the-callers-own-user-data >/dev/ttyS0']]\n"


def test_an_untouched_cloud_image_starts_the_agent(tmp_path: Path) -> None:
    """The seed beside the image is enough; the caller's own user-data is applied as well."""
    for program in ("mmdebstrap", "extlinux"):
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        require(shutil.which(program, path=path), f"{program} is not installed")
    image = build_image("debian-12-cloud-init", control=Control())
    before = digest(image)
    iso, layer, log = tmp_path / "seed.iso", tmp_path / "layer.qcow2", tmp_path / "console.log"
    options = InjectOptions(vm_id="web-1", manager_url=MANAGER_URL)
    report = make_seed(image, iso, options, seed=SeedOptions(user_data=OWN_DATA))
    assert report.kind == "cloud-init"
    assert report.guest is not None
    assert [each.program for each in report.guest.first_boot] == ["cloud-init"]
    assert digest(image) == before

    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]
    subprocess.run([*create, str(image), str(layer)], check=True)
    deadline = time.monotonic() + BOOT_SECONDS
    with booted(
        layer,
        seconds=BOOT_SECONDS + 60,
        console_log=log,
        firmware=["-drive", f"file={iso},format=raw,if=virtio,readonly=on"],
    ) as (machine, listener):
        health = wait_for_http(f"{machine.agent_url}/health", deadline, machine)
        information = wait_for_http(f"{machine.agent_url}/info", deadline, machine)
        reports = listener.wait_for_reports(1, deadline=deadline, check=machine.check)
        while b"the-callers-own-user-data" not in log.read_bytes():
            machine.check()
            assert time.monotonic() < deadline, "runcmd of the caller's user-data did not run"
            time.sleep(0.5)
    assert health["version"] == report.agent_version
    assert information["vm_id"] == "web-1"
    assert information["init"]["cgroup"] == "/system.slice/guest-agent.service"
    assert reports[0].path == "/v1/vms/web-1/guest-ip"
    assert reports[0].body == {"guest_ip": "10.0.2.15"}
    assert digest(image) == before
