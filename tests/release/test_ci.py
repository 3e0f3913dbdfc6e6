"""What ci/ offers to CI services: its shell is clean, and it installs what the pages say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require
from tests.release.workflow import REPOSITORY, action, gitlab_job

CI = REPOSITORY / "ci"
INSTALLING = REPOSITORY / "docs/installing.md"
APT = re.compile(r"apt-get install --yes --no-install-recommends ([a-z0-9 -]+)")
# what one place needs and the others do not
OWN = {"pipx", "python3-venv", "ca-certificates", "gpg"}


def shellcheck(script: str | Path, shell: str) -> None:
    """Fail the test if shellcheck finds anything in a script, or in a text of one."""
    require(shutil.which("shellcheck"), "shellcheck is not installed")
    text = script.read_text("utf-8") if isinstance(script, Path) else script
    done = subprocess.run(
        ["shellcheck", f"--shell={shell}", "-"],
        input=text,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_action_is_shell_without_substitutions() -> None:
    """Inputs reach the action's shell as variables: pasted into it, they could be commands."""
    steps = [step for step in action()["runs"]["steps"] if "run" in step]
    assert len(steps) == 3
    for step in steps:
        assert step["shell"] == "bash"
        assert "${{" not in step["run"]
        shellcheck(f"#!/bin/bash\n{step['run']}", "bash")


def test_the_job_of_gitlab_is_shell() -> None:
    """Its lines are clean, but that a list of bake files is meant to be split."""
    lines = "\n".join(gitlab_job()["script"])
    shellcheck(f"#!/bin/sh\n# shellcheck disable=SC2086\n{lines}", "sh")


def test_only_what_the_next_job_can_use_is_kept() -> None:
    """Both services keep the same folders of the cache, and no saved appliance."""
    step = next(step for step in action()["runs"]["steps"] if "uses" in step)
    of_github = [Path(path).name for path in step["with"]["path"].split()]
    of_gitlab = [Path(path).name for path in gitlab_job()["cache"]["paths"]]
    assert of_github == of_gitlab == ["bake", "images", "runtimes"]


def test_the_installer_is_posix_shell() -> None:
    """``ci/install`` runs under dash and BusyBox."""
    shellcheck(CI / "install", "sh")


@pytest.mark.parametrize("page", [INSTALLING, CI / "Containerfile"])
def test_everybody_installs_the_same_packages(page: Path) -> None:
    """The page, the Containerfile and the installer name the same packages."""
    text = (CI / "install").read_text("utf-8")
    (packages,) = re.findall(r"PACKAGES='([^']*)'", text)
    wanted = {*packages.split(), "linux-image-cloud-amd64"} - OWN
    lists = APT.findall(page.read_text("utf-8"))
    assert lists
    assert [set(line.split()) - OWN for line in lists] == [wanted] * len(lists)


def test_the_debian_package_is_installed_with_what_it_recommends() -> None:
    """The page's command names all of it, as apt is told not to take anybody's."""
    control = (REPOSITORY / "debian/control").read_text("utf-8")
    (recommended,) = re.findall(r"^Recommends:\n((?: .*\n)+)", control, re.MULTILINE)
    first = {line.split()[0].rstrip(",") for line in recommended.splitlines()}
    (command,) = re.findall(
        r"--no-install-recommends \./vmprovision_\S+ (.*)", INSTALLING.read_text("utf-8")
    )
    assert set(command.split()) == first
