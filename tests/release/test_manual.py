"""The manual pages: clean for mandoc, and as complete as ``--help`` and the pages of docs/."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from release.manual import main
from tests.conftest import require
from vmprovision.agent.config import KEYS
from vmprovision.cli.app import app

REPOSITORY = Path(__file__).resolve().parents[2]
# mandoc looks for these among the manuals that are installed
OURS = re.compile(
    r"referenced manual not found: Xr (?:vmprovision 1|vmprovision-bake 5|guest-agent 8)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the pages and completions."""
    made = tmp_path_factory.mktemp("manual")
    main(made)
    return made


def shown(page: Path) -> str:
    """Return a page as a reader sees it, on one line."""
    command = ["mandoc", "-T", "utf8", "-O", "width=500", str(page)]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return " ".join(re.sub(".\b", "", text).split())


@pytest.fixture(autouse=True)
def _mandoc() -> None:
    require(shutil.which("mandoc"), "mandoc is not installed")


def test_mandoc_finds_nothing(folder: Path) -> None:
    """No page has a fault of style, of mdoc(7) or of roff(7)."""
    pages = sorted(folder.glob("*.[1-8]"))
    assert [page.name for page in pages] == [
        "guest-agent.8",
        "vmprovision-bake.5",
        "vmprovision.1",
    ]
    command = ["mandoc", "-T", "lint", *map(str, pages)]
    found = subprocess.run(command, capture_output=True, check=False, text=True).stdout
    assert [line for line in found.splitlines() if not OURS.search(line)] == []


def test_every_option_of_the_help_is_there(folder: Path) -> None:
    """``vmprovision(1)`` has the words and options that each ``--help`` prints."""
    page = shown(folder / "vmprovision.1")
    for words in (["inject"], ["bake"], ["seed"], ["image", "build"], ["appliance", "clear"]):
        text = CliRunner().invoke(app, [*words, "--help"], env={"TERM": "dumb"}).output
        options = set(re.findall(r"--[a-z][a-z-]+", text))
        assert "--help" in options
        section = page.split(f" {' '.join(words)} ", 1)[1]
        assert [each for each in options - {"--help"} if each not in section] == []


def test_every_exit_code_is_there(folder: Path) -> None:
    """``vmprovision(1)`` has each code of docs/exit-codes.md, and no other."""
    listed = (REPOSITORY / "docs/exit-codes.md").read_text("utf-8")
    source = (folder / "vmprovision.1").read_text("utf-8").split(".Sh EXIT STATUS")[1]
    codes = set(re.findall(r"^\.It (\d+)$", source, re.MULTILINE))
    assert codes == set(re.findall(r"^\| (\d+) \|", listed, re.MULTILINE)) | {"3", "4"}


def test_every_key_of_a_bake_file_is_there(folder: Path) -> None:
    """``vmprovision-bake(5)`` has every table and key that the schema has."""
    source = (folder / "vmprovision-bake.5").read_text("utf-8")
    schema = json.loads((REPOSITORY / "docs/bake.schema.json").read_text("utf-8"))
    for definition in schema["$defs"].values():
        for key in definition["properties"]:
            assert f".It Cm \\&{key}\n" in source


def test_every_setting_of_the_agent_is_there(folder: Path) -> None:
    """``guest-agent(8)`` has every key that the agent reads."""
    page = shown(folder / "guest-agent.8").split(" CONFIGURATION ")[1]
    assert [key for key in KEYS if key not in page] == []


def test_completions_are_shell(folder: Path) -> None:
    """The completions for bash parse, and those for other shells name the program."""
    subprocess.run(["bash", "-n", str(folder / "vmprovision.bash")], check=True)
    assert (folder / "_vmprovision").read_text().startswith("#compdef vmprovision\n")
    assert "--command vmprovision" in (folder / "vmprovision.fish").read_text()
