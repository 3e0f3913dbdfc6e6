"""Cloud images as distributions make them, booted by their own GRUB while cloud-init runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import vmprovision
from tests.conftest import require
from tests.image.trees import Mount, Sight, look_into
from vmprovision.appliance.drives import Drive
from vmprovision.inspection.boot import UEFI
from vmprovision.progress import Control
from vmprovision.proof.machine import MANAGER_URL, BootSource, boot, wait_for_http
from vmprovision.proof.prove import metric_faults
from vmprovision.proof.report_listener import ReportListener
from vmprovision.seed.iso import make_iso

from .test_machine import overlay, recipe_image

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

BOOT_SECONDS = 900.0  # cloud-init is much Python: without KVM, on a loaded host
# printed when all of cloud-init's stages are over
USER_DATA = b"#cloud-config\nruncmd: [[sh, -c, 'echo cloud-init-is-done >/dev/ttyS0']]\n"
IMAGE = vmprovision.ImageOptions(format="qcow2", allow_backing=True)
ESP = Mount(device="2", at="/boot/efi")
BOOT = Mount(device="3", at="/boot")
# recipe -> its filesystems, and what /metrics says of them: mount point -> kind
GUESTS: dict[str, tuple[Sequence[Mount], dict[str, str]]] = {
    "ext4": ([Mount(device="3"), ESP], {"/": "ext4", "/boot/efi": "vfat"}),
    "xfs": (
        [Mount(device="4"), BOOT, ESP],
        {"/": "xfs", "/boot": "ext4", "/boot/efi": "vfat"},
    ),
    "btrfs": (
        [
            Mount(device="3", options="subvol=@"),
            *(
                Mount(device="3", at=place, options=f"subvol=@{place}")
                for place in ("/home", "/usr/local", "/var")
            ),
            ESP,
        ],
        {"/": "btrfs", "/boot/efi": "vfat"},
    ),
    "lvm": (
        [Mount(device="/dev/vg0/root"), BOOT, ESP],
        {"/": "ext4", "/boot": "ext4", "/boot/efi": "vfat"},
    ),
}


@pytest.mark.parametrize("name", GUESTS)
def test_remove_brings_a_cloud_image_back(name: str, tmp_path: Path) -> None:
    """Whatever its filesystems are, the image holds the same files, labels and modes as before."""
    mounts, _ = GUESTS[name]
    disk = overlay(recipe_image(f"debian-13-cloud-{name}"), tmp_path / "image.qcow2")
    sight = Sight(path=disk, format="qcow2", mounts=mounts)
    before = look_into(sight, tmp_path)
    guest = vmprovision.inject(disk, source=IMAGE).guest
    assert (guest.init.system, guest.init.confidence) == ("systemd", "certain")
    assert [each.program for each in guest.first_boot] == ["cloud-init"]
    vmprovision.remove(disk, source=IMAGE)
    assert look_into(sight, tmp_path) == before


@pytest.mark.parametrize("name", GUESTS)
def test_a_cloud_image_serves_two_clones(name: str, tmp_path: Path) -> None:
    """Each clone has the identity that cloud-init gives it, by a PC's BIOS and by UEFI."""
    ovmf = next((Path(path) for path in UEFI["x86_64"][1] if Path(path).is_file()), None)
    require(ovmf, "ovmf is not installed")
    _, filesystems = GUESTS[name]
    disk = overlay(recipe_image(f"debian-13-cloud-{name}"), tmp_path / "image.qcow2")
    options = vmprovision.InjectOptions(manager_url=MANAGER_URL)
    vmprovision.inject(disk, options, source=IMAGE)
    for each, source in (
        ("web-1", BootSource(display=True)),
        ("web-2", BootSource(firmware=ovmf)),
    ):
        information, metrics = boot_clone(disk, tmp_path / each, source)
        assert information["vm_id"] == each
        assert information["hostname"] == f"host-of-{each}"
        assert information["init"]["cgroup"] == "/system.slice/guest-agent.service"
        assert "10.0.2.15" in information["addresses"]
        assert metric_faults(metrics) == []
        found = {entry["mountpoint"]: entry["type"] for entry in metrics["file_systems"]}
        assert filesystems.items() <= found.items()


def boot_clone(disk: Path, folder: Path, source: BootSource) -> tuple[Any, Any]:
    """Boot a clone with a NoCloud seed; return /info and /metrics after cloud-init is done.

    The clone's instance id is the folder's name.
    """
    folder.mkdir()
    name, log, seed = folder.name, folder / "console.log", folder / "seed.iso"
    identity = f"instance-id: {name}\nlocal-hostname: host-of-{name}\n"
    files = {"meta-data": identity.encode(), "user-data": USER_DATA}
    seed.write_bytes(make_iso("cidata", files))
    deadline = time.monotonic() + BOOT_SECONDS
    with (
        ReportListener() as listener,
        boot(
            Drive(path=overlay(disk, folder / "clone.qcow2"), format="qcow2"),
            source=source,
            agent_port=8080,
            manager=listener.address,
            control=Control(),
            seconds=BOOT_SECONDS + 60,
            console_log=log,
            firmware=["-drive", f"file={seed},format=raw,if=virtio,readonly=on"],
        ) as machine,
    ):
        wait_for_http(f"{machine.agent_url}/health", deadline, machine)
        reports = listener.wait_for_reports(1, deadline=deadline, check=machine.check)
        while b"cloud-init-is-done" not in log.read_bytes():
            machine.check()
            assert time.monotonic() < deadline, "cloud-init did not come to its end"
            time.sleep(0.5)
        metrics = wait_for_http(f"{machine.agent_url}/metrics", deadline, machine)
        information = wait_for_http(f"{machine.agent_url}/info", deadline, machine)
    assert reports[0].path == f"/v1/vms/{name}/guest-ip"
    assert reports[0].body == {"guest_ip": "10.0.2.15"}
    return information, metrics
