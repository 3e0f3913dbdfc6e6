"""The wheel works by itself: installed elsewhere, it does everything without the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Protocol

import pytest

from tests.conftest import require
from tests.trees import SYSTEMD_TREE, make_tree, tree_state

CHECKOUT = Path(__file__).resolve().parents[1]
SYSTEM_PYTHON = Path("/usr/bin/python3")  # the libguestfs binding is made for this one
TIME_LIMIT = 600.0


class Installed(Protocol):
    """Run a program of the environment in which only the wheel is installed."""

    def __call__(self, name: str, /, *args: str | Path) -> str:
        """Return the program's standard output; fail the test unless it exits with 0."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built from this checkout."""
    require(SYSTEM_PYTHON.exists(), f"there is no {SYSTEM_PYTHON}")
    folder = tmp_path_factory.mktemp("wheel")
    run(["-m", "venv", "--system-site-packages", folder / "venv"], SYSTEM_PYTHON, folder)
    return build("wheel", CHECKOUT, folder)


def build(kind: str, source: Path, folder: Path) -> Path:
    """Return the wheel or the sdist of a source tree, built into that folder."""
    run(["-m", "hatchling", "build", "-t", kind, "-d", folder], Path(sys.executable), source)
    return next(folder.glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[kind]))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Installed:
    """Return a runner for the wheel in an environment of its own, used from an empty directory."""
    pip(wheel.parent, "install", wheel)
    empty = wheel.parent / "empty"
    empty.mkdir()

    def program(name: str, /, *args: str | Path) -> str:
        return run(args, wheel.parent / "venv" / "bin" / name, empty)

    return program


def pip(folder: Path, *args: str | Path) -> str:
    """Return what pip prints, run in the environment in that folder."""
    options = ["--quiet", "--no-input", "--disable-pip-version-check"]
    return run(["-m", "pip", *args, *options], folder / "venv" / "bin" / "python", folder)


def run(args: list[str | Path] | tuple[str | Path, ...], program: Path, folder: Path) -> str:
    """Return what a program prints, run as by a user, with nothing that leads to the checkout."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    done = subprocess.run(
        [program, *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
        timeout=TIME_LIMIT,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in hidden},
    )
    assert done.returncode == 0, f"{program} {args}:\n{done.stdout}{done.stderr}"
    return done.stdout


def files_below(folder: Path) -> set[str]:
    """Return the repository's files below a top-level folder, as the wheel should name them."""
    return {
        f"vmprovision/{path.relative_to(CHECKOUT)}" for path in folder.rglob("*") if path.is_file()
    }


def test_the_wheel_holds_all_that_is_no_code(wheel: Path) -> None:
    """Templates, recipes and the typing marker are in the wheel, and nothing beside the package."""
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = files_below(CHECKOUT / "templates") | files_below(CHECKOUT / "images")
    assert len(wanted) > 10
    assert wanted <= names
    assert "vmprovision/py.typed" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vmprovision"}


def test_the_wheel_is_reproducible(wheel: Path, tmp_path: Path) -> None:
    """Built again, from the tree or from the sdist, it has the same bytes."""
    assert build("wheel", CHECKOUT, tmp_path).read_bytes() == wheel.read_bytes()
    subprocess.run(["tar", "-xf", build("sdist", CHECKOUT, tmp_path), "-C", tmp_path], check=True)
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (tmp_path / "again").mkdir()
    again = build("wheel", source, tmp_path / "again")
    assert again.read_bytes() == wheel.read_bytes()


def test_the_package_is_imported_from_the_wheel(installed: Installed, wheel: Path) -> None:
    """Nothing of the checkout is used."""
    place = installed("python", "-c", "import vmprovision; print(vmprovision.__file__)")
    assert Path(place).is_relative_to(wheel.parent)


def test_templates_render(installed: Installed) -> None:
    """``render`` and ``image list`` find templates and recipes in the installed package."""
    assert "ExecStart=/usr/local/bin/guest-agent" in installed("vmprovision", "render", "systemd")
    folders = {folder.name for folder in (CHECKOUT / "images").iterdir()}
    recipes = {name for name in folders if not name.startswith("_")}
    listed = json.loads(installed("vmprovision", "image", "list", "--json"))["recipes"]
    assert {recipe["name"] for recipe in listed} == recipes


def test_a_directory_is_injected(installed: Installed, tmp_path: Path) -> None:
    """The agent gets into an unpacked root filesystem, and out again without a trace."""
    tree = make_tree(tmp_path / "guest", SYSTEMD_TREE)
    before = tree_state(tree)
    installed("vmprovision", "inject", tree, "--vm-id", "wheel-1")
    agent = tree / "usr/local/bin/guest-agent"
    assert agent.stat().st_mode & 0o7777 == 0o755
    assert "VM_ID=wheel-1\n" in (tree / "etc/guest-agent.conf").read_text()
    assert "guest-agent" in installed("python", agent, "--version")
    installed("vmprovision", "remove", tree)
    assert tree_state(tree) == before


@pytest.mark.appliance
def test_an_image_is_injected(installed: Installed, fresh_debian: Path) -> None:
    """The agent gets into a real disk image, and a second injection changes nothing."""
    report = json.loads(
        installed("vmprovision", "inject", fresh_debian, "--vm-id", "wheel-2", "--json")
    )
    assert report["changed"]
    assert (
        json.loads(installed("vmprovision", "verify", fresh_debian, "--json"))["mismatches"] == []
    )
    again = json.loads(installed("vmprovision", "inject", fresh_debian, "--json"))
    assert again["changed"] == []
