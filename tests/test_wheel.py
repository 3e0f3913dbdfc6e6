"""The wheel works by itself: installed elsewhere, it does everything without the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import httpx
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


def source_files() -> set[str]:
    """Return what the wheel has to hold: the files of package, templates and recipes."""
    package = {path for path in files_below("vmprovision") if path.parts[1] != "runtimes"}
    data = {"vmprovision" / path for name in ("templates", "images") for path in files_below(name)}
    return {str(path) for path in package | data}


def files_below(folder: str) -> set[Path]:
    """Return the files below a top-level folder of the repository, without Python's own."""
    return {
        path.relative_to(CHECKOUT)
        for path in (CHECKOUT / folder).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }


def test_the_wheel_holds_every_file_of_the_source(wheel: Path) -> None:
    """Code, pages with script and style, migrations, templates and recipes; nothing beside it."""
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = source_files()
    kinds = {Path(name).suffix for name in wanted}
    assert {".py", ".typed", ".j2", ".css", ".js", ".svg", ".mako", ".c", ".toml"} <= kinds
    assert wanted - names == set()
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


def test_an_extra_that_is_missing_is_named(installed: Installed, wheel: Path) -> None:
    """The error has each missing package, and the command that installs all of them."""
    assert installed("vmprovision", "--version")
    done = subprocess.run(
        [wheel.parent / "venv/bin/vmprovision", "serve"],
        capture_output=True,
        check=False,
        text=True,
        timeout=TIME_LIMIT,
        cwd=wheel.parent / "empty",
    )
    assert done.returncode == 40
    assert "the extra server is not complete" in done.stderr
    assert "fastapi" in done.stderr
    assert "/venv/bin/python -m pip install 'vmprovision[server]'\n" in done.stderr


def test_the_server_has_its_pages(installed: Installed, wheel: Path, tmp_path: Path) -> None:
    """``serve`` of the installed wheel makes its database, and sends a page with all it names."""
    require(importlib.util.find_spec("libvirt"), "libvirt's Python binding is not installed")
    assert installed("vmprovision", "--version")
    address = f"unix:{tmp_path}/socket"
    libraries = str(Path(httpx.__file__).parents[1])  # the extra's; vmprovision is not there
    with subprocess.Popen(
        [
            *(wheel.parent / "venv/bin/vmprovision", "serve", "--json"),
            *("--listen", address, "--state", tmp_path / "state"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=wheel.parent / "empty",
        env={**os.environ, "PYTHONPATH": libraries},
    ) as serving:
        ready = serving.stdout.readline() if serving.stdout else ""
        try:
            assert json.loads(ready or "{}") == {"listen": address}
            transport = httpx.HTTPTransport(uds=address.removeprefix("unix:"))
            with httpx.Client(transport=transport, base_url="http://localhost") as client:
                page = client.get("/", follow_redirects=True)
                named = set(re.findall(r'(?:href|src)="(/static/[^"]+)"', page.text))
                sent = {Path(urlsplit(name).path).name: client.get(name) for name in named}
        finally:
            serving.terminate()
            errors = serving.communicate(timeout=TIME_LIMIT)[1]
    assert set(sent) == {"htmx.min.js", "icon.svg", "live.js", "style.css"}, errors
    assert {(answer.status_code, bool(answer.content)) for answer in sent.values()} == {(200, True)}


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
