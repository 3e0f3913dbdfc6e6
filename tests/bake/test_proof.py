"""A bake of a recipe that is proven by a boot."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.bake.test_bake import bake
from tests.conftest import require
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.host.cache import cache_directory
from vmprovision.progress import Control
from vmprovision.proof.machine import BootSource, boot

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import RunCli

BOOT_MENU = "/boot/extlinux/extlinux.conf"
# systemd-run-generator(8); no $ in it, which systemd would expand
COUNTING = "systemd.run=\"/bin/sh -c 'dpkg -l | grep -c ^ii | sed s/^/packages:/ >/dev/ttyS0'\""
BOOT_SECONDS = 900.0


def listed_in(folder: Path) -> int:
    """How many packages of Debian the SBOM of a bake has."""
    components = json.loads((folder / "sbom.cdx.json").read_text())["components"]
    return sum(each.get("purl", "").startswith("pkg:deb/") for each in components)


def installed_in(image: Path) -> int:
    """How many packages the guest's own dpkg lists, run in an appliance."""
    with open_appliance(
        [Drive(path=image, format="qcow2", readonly=True)], control=Control()
    ) as appliance:
        appliance.call("mount_ro", "/dev/sda1", "/")
        listed = appliance.call("command", ["dpkg", "-l"])
    return sum(line.startswith("ii") for line in listed.splitlines())


@pytest.mark.boot
def test_a_recipe_is_baked_proven_and_counted(
    run_cli: RunCli, debian_image_source: Path, tmp_path: Path
) -> None:
    """The proof's answers are in bake.json; the SBOM has as many packages as the guest's dpkg."""
    require(debian_image_source, "there is no Debian image")
    file = tmp_path / "debian.toml"
    file.write_text(
        '[source]\nrecipe = "debian-12-systemd"\n[prove]\ntimeout = 900\n'
        '[[output]]\nformat = "qcow2"\n'
    )
    result = bake(run_cli, file, "--refresh")
    folder = tmp_path / "debian"
    document = json.loads((folder / "bake.json").read_text())
    assert document["proof"]["health"]["status"] == "healthy"
    assert document["proof"]["seconds"] == result["proof_seconds"] > 0
    assert listed_in(folder) == installed_in(folder / "debian.qcow2")
    shutil.rmtree(cache_directory() / "bake" / result["key"])


def counted_by(image: Path, layer: Path) -> int:
    """Boot a layer over an image, whose kernel has one command to run; return what it counts."""
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]
    subprocess.run([*create, str(image), str(layer)], check=True)
    with open_appliance([Drive(path=layer, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda1", "/")
        menu = appliance.call("read_file", BOOT_MENU).decode()
        asking = re.sub(r"(?im)^(\s*append .*)$", lambda line: f"{line[1]} {COUNTING}", menu)
        assert asking != menu
        appliance.call("write", BOOT_MENU, asking.encode())
        appliance.call("umount_all")
    log = layer.with_suffix(".log")
    deadline = time.monotonic() + BOOT_SECONDS
    with boot(
        Drive(path=layer, format="qcow2"),
        source=BootSource(),
        agent_port=8080,
        manager="127.0.0.1:9",
        control=Control(),
        seconds=BOOT_SECONDS + 60,
        console_log=log,
    ):
        while not (found := re.search(rb"packages:(\d+)\r?\n", log.read_bytes())):
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
            time.sleep(0.5)
    return int(found[1])


@pytest.mark.boot
@pytest.mark.slow
def test_the_booted_guest_counts_the_same_packages(
    run_cli: RunCli, debian_image_source: Path, tmp_path: Path
) -> None:
    """The SBOM has as many packages as ``dpkg -l`` prints in the guest when it runs."""
    require(debian_image_source, "there is no Debian image")
    file = tmp_path / "counted.toml"
    file.write_text('[source]\nrecipe = "debian-12-systemd"\n[[output]]\nformat = "qcow2"\n')
    result = bake(run_cli, file, "--refresh")
    folder = tmp_path / "counted"
    assert listed_in(folder) == counted_by(folder / "counted.qcow2", tmp_path / "layer.qcow2")
    shutil.rmtree(cache_directory() / "bake" / result["key"])
