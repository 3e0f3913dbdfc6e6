"""Guests that no recipe builds: each disk image in the folder that a variable names."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import vmprovision
from tests.conftest import require
from tests.image.trees import Mount, Sight, Tree, differences, look_into
from tests.proof.booting import booted
from vmprovision.proof.machine import MANAGER_URL, wait_for_http

from .test_machine import overlay

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

VARIABLE = "VMPROVISION_GUESTS"
SECONDS = 900.0
SOURCE = vmprovision.ImageOptions(format="qcow2", allow_backing=True)
GUESTS = sorted(Path(os.environ.get(VARIABLE) or os.devnull).glob("*.qcow2"))
# what names a machine, where the guest's kernel shows SMBIOS
NAMES = [
    word
    for setting in ("vm_id=web-1", f"manager_url={MANAGER_URL}")
    for word in ("-smbios", f"type=11,value=guest_agent.{setting}")
]
EVERY_GUEST = pytest.mark.parametrize(
    "image", GUESTS or [None], ids=lambda image: image.stem if image else "none"
)


def clone_of(image: Path | None, folder: Path) -> Path:
    """Return an overlay over the image; skip the test if there is no image."""
    require(image, f"{VARIABLE} names no folder with *.qcow2", optional=True)
    assert image
    return overlay(image, folder / "clone.qcow2")


def tree_of(disk: Path, folder: Path) -> Tree:
    """Return all files of the guest, on all its filesystems."""
    mounted = vmprovision.inspect(disk, source=SOURCE).mountpoints
    mounts = [
        Mount(device=device.removeprefix("/dev/sda"), at=at) for at, device in mounted.items()
    ]
    mounts.sort(key=lambda mount: mount.at)  # parents first
    return look_into(Sight(path=disk, format="qcow2", mounts=mounts), folder)


@EVERY_GUEST
def test_a_guest_answers_and_comes_back(image: Path | None, tmp_path: Path) -> None:
    """It is injected without a doubt, boots by its own loader, and `remove` restores its files."""
    disk = clone_of(image, tmp_path)
    before = tree_of(disk, tmp_path)
    guest = vmprovision.inject(disk, source=SOURCE).guest
    assert guest.init.confidence == "certain"
    proof = vmprovision.prove(disk, vmprovision.ProofOptions(timeout=SECONDS), source=SOURCE)
    assert proof.init == guest.init.system
    vmprovision.remove(disk, source=SOURCE)
    assert differences(before, tree_of(disk, tmp_path)) == {}


@EVERY_GUEST
def test_a_clone_learns_its_name_and_forgets_the_agent(image: Path | None, tmp_path: Path) -> None:
    """The agent starts late enough to read SMBIOS; after a boot, `remove` leaves nothing of it."""
    disk = clone_of(image, tmp_path)
    guest = vmprovision.inject(disk, source=SOURCE).guest
    require(guest.arch in ("x86_64", "i386"), "only a PC shows SMBIOS strings for certain")
    deadline = time.monotonic() + SECONDS
    with booted(disk, firmware=NAMES) as (machine, listener):
        information = wait_for_http(f"{machine.agent_url}/info", deadline, machine)
        assert information["identity"]["vm_id"]["value"] == "web-1"
        reports = listener.wait_for_reports(1, deadline=deadline, check=machine.check)
        assert reports[0].path == "/v1/vms/web-1/guest-ip"
    repaired = vmprovision.ImageOptions(format="qcow2", allow_backing=True, repair=True)
    vmprovision.remove(disk, source=repaired)  # its machine was killed
    assert not [path for path in tree_of(disk, tmp_path) if "guest-agent" in path]
