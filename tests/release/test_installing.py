"""The commands of docs/installing.md and the action of ci/, in fresh Debians, as a plain user."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from tests.release.machine import Machine, make_machine
from tests.release.workflow import REPOSITORY, added_path, gitlab_job, run_action

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
DIST = REPOSITORY / "dist"
CHECKOUT = PurePosixPath("/home/ci/vmprovision-source")
WAYS = {
    "pipx": ("pipx", "*.whl", ["bookworm", "trixie"]),
    "venv": ("A virtual environment", "*.whl", ["bookworm", "trixie"]),
    "deb": ("The Debian package", "*.deb", ["trixie"]),
}
RECIPE = '[source]\nrecipe = "debian-12-systemd"\n[prove]\ntimeout = 900\n'
OUTPUT = '[[output]]\nformat = "qcow2"\n'
WRONG = f'[source]\nimage = "debian.toml"\nsha256 = "{"0" * 64}"\n{OUTPUT}'
MISSPELT = f'[source]\nrecipe = "debian-12-systemd"\nformatt = "raw"\n{OUTPUT}'


def commands(section: str) -> str:
    """Return the shell of a section of docs/installing.md."""
    text = (REPOSITORY / "docs/installing.md").read_text("utf-8")
    block = re.search(rf"^## {section}\n.*?```sh\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return block[1]


def build_steps() -> list[tuple[str, str]]:
    """Return the instructions of the Containerfile, each with its words."""
    lines = (REPOSITORY / "ci/Containerfile").read_text("utf-8").splitlines()
    found = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [(instruction, words) for instruction, _, words in found]


def give(machine: Machine, *paths: Path) -> None:
    """Copy files into the home of a machine's user."""
    for path in paths:
        shutil.copy(path, machine.home)
    machine.run("chown -R ci:ci /home/ci && chmod -R u+w /home/ci", user="root")


def built(pattern: str) -> Path:
    """Return what a session has built; skip the test without it."""
    found = sorted(DIST.glob(pattern))
    require(found, f"there is no {pattern} in dist/: nox -s wheel deb", optional=True)
    return found[-1]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Return where a machine can be made; it is removed afterwards, for it takes gigabytes."""
    yield tmp_path / "machine"
    shutil.rmtree(tmp_path / "machine", ignore_errors=True)


@pytest.mark.parametrize(
    ("way", "suite"), [(way, suite) for way, (_, _, suites) in WAYS.items() for suite in suites]
)
def test_the_documented_commands_install_it(
    way: str, suite: str, debian_image_source: Path, place: Path
) -> None:
    """After two commands on a bare Debian, a plain user inspects, injects and verifies."""
    section, pattern, _ = WAYS[way]
    package = built(pattern)
    machine = make_machine(suite, place)
    image = machine.home / "disk.qcow2"
    give(machine, package)
    subprocess.run(["cp", "--sparse=always", debian_image_source, image], check=True)
    give(machine)
    lines = commands(section).strip().splitlines()
    assert len(lines) <= 2
    begun = time.monotonic()
    machine.run("set -e\n" + "\n".join(lines), variables={"DEBIAN_FRONTEND": "noninteractive"})
    print(f"{way} on {suite}: installed in {time.monotonic() - begun:.0f} s")  # noqa: T201 -- measured
    path = "PATH=venv/bin:$PATH\n"
    seen = json.loads(machine.run(f"{path}vmprovision inspect --json disk.qcow2").stdout)
    assert seen["init"]["system"] == "systemd"
    machine.run(f"{path}vmprovision inject disk.qcow2 --vm-id web-1")
    checked = json.loads(machine.run(f"{path}vmprovision verify --json disk.qcow2").stdout)
    assert checked["mismatches"] == []
    runtimes = json.loads(machine.run(f"{path}vmprovision runtime verify --json").stdout)
    assert len(runtimes["runtimes"]) == 7


def test_the_containerfile_builds(debian_image_source: Path, place: Path) -> None:
    """Its steps succeed in a bare Debian 13; then any user without a home inspects an image."""
    wheel = built("*.whl")
    machine = make_machine("trixie", place)
    steps = build_steps()
    for instruction, words in steps:
        if instruction == "COPY":
            shutil.copy(wheel, place / words.split()[-1].lstrip("/"))
        elif instruction == "RUN":
            machine.run(words, user="root", variables={"DEBIAN_FRONTEND": "noninteractive"})
    variables = dict(words.split("=", 1) for each, words in steps if each == "ENV")
    image = place / "srv/disk.qcow2"
    subprocess.run(["cp", "--sparse=always", debian_image_source, image], check=True)
    image.chmod(0o644)
    (user,) = (words for each, words in steps if each == "USER")
    command = (
        f"setpriv --reuid={user} --regid=nogroup --clear-groups "
        "vmprovision inspect --json /srv/disk.qcow2"
    )
    seen = json.loads(machine.run(command, user="root", variables=variables).stdout)
    assert seen["init"]["system"] == "systemd"
    bake_as_gitlab_does(machine, image, user, variables)


def bake_as_gitlab_does(
    machine: Machine, image: Path, user: str, variables: dict[str, str]
) -> None:
    """Run GitLab's job where the Containerfile's steps were run; its outputs are there then."""
    template = gitlab_job()
    project = machine.root / "builds"
    (project / "images").mkdir(parents=True)
    image.rename(project / "images/disk.qcow2")
    sha256 = hashlib.sha256((project / "images/disk.qcow2").read_bytes()).hexdigest()
    text = f'[source]\nimage = "disk.qcow2"\nsha256 = "{sha256}"\n{OUTPUT}'
    (project / "images/golden.toml").write_text(text)
    own = {"CI_PROJECT_DIR": "/builds", **template["variables"]}
    own = {name: text.replace("$CI_PROJECT_DIR", "/builds") for name, text in own.items()}
    script = "set -e\ncd /builds\n" + "\n".join(template["script"])
    command = f"setpriv --reuid={user} --regid=nogroup --clear-groups sh -c {shlex.quote(script)}"
    machine.run(f"chown -R {user} /builds", user="root")
    machine.run(command, user="root", variables={**variables, **own})
    kept = template["artifacts"]
    assert {path.name for path in (project / kept["paths"][0]).iterdir()} == {"golden"}
    machine.run("cd /builds/baked/golden && sha256sum -c SHA256SUMS", user="root")
    report = (project / kept["reports"]["junit"]).read_text("utf-8")
    assert 'failures="0"' in report


@pytest.mark.parametrize("kvm", [False, True], ids=["without-kvm", "with-kvm"])
def test_the_action_bakes(kvm: bool, place: Path) -> None:  # noqa: FBT001 -- a parameter
    """A recipe is baked and proven; the second run takes the cache; faults are annotations."""
    wheel = built("*.whl")
    machine = make_machine("bookworm", place, kvm=kvm)
    shutil.copytree(REPOSITORY / "ci", place / str(CHECKOUT)[1:] / "ci")
    texts = {"debian": RECIPE + OUTPUT, "wrong": WRONG, "misspelt": MISSPELT}
    for name, text in texts.items():
        (machine.home / f"{name}.toml").write_text(text)
    give(machine, wheel)
    inputs = {"source": f"/home/ci/{wheel.name}"}
    done = run_action(machine, CHECKOUT, {**inputs, "files": "debian.toml"})
    assert done.returncode == 0, done.stderr
    folder = machine.home / "baked/debian"
    assert json.loads((folder / "bake.json").read_text())["proof"]["health"]["status"] == "healthy"
    machine.run("cd baked/debian && sha256sum -c SHA256SUMS")
    again = run_action(machine, CHECKOUT, {**inputs, "files": "debian.toml"})
    assert "nothing to do" in again.stdout
    bake_by_packer(machine)
    for name, line in (("wrong", 3), ("misspelt", 3)):
        failed = run_action(machine, CHECKOUT, {**inputs, "files": f"{name}.toml"})
        assert failed.returncode != 0
        assert f"::error file={name}.toml,line={line}" in failed.stderr
        assert not (machine.home / "baked" / name).exists()


def bake_by_packer(machine: Machine) -> None:
    """Let Packer build the example of ci/ with what the action has installed, and its cache."""
    machine.run("sudo apt-get install -y -qq --no-install-recommends packer")
    example = CHECKOUT / "ci/packer/golden.pkr.hcl"
    done = machine.run(
        f"PATH={added_path(machine)}:$PATH packer build -var bake_file=debian.toml {example}"
    )
    assert "debian.toml: taken from the cache" in done.stdout
    machine.run("cd debian && sha256sum -c SHA256SUMS")
