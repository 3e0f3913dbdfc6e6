"""A bake of a recipe that is proven by a boot."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.bake.test_bake import bake
from tests.conftest import require
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.host.cache import cache_directory
from vmprovision.progress import Control

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import RunCli


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
    components = json.loads((folder / "sbom.cdx.json").read_text())["components"]
    packages = [each for each in components if each.get("purl", "").startswith("pkg:deb/")]
    assert len(packages) == installed_in(folder / "debian.qcow2")
    shutil.rmtree(cache_directory() / "bake" / result["key"])
