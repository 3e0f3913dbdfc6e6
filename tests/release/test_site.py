"""The documentation site: its contents are complete, and nothing in it leads nowhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from release.site import DOCS, NAVIGATION, main
from tests.conftest import require

if TYPE_CHECKING:
    from collections.abc import Iterator

TOUR_SECONDS = 1800.0


def test_every_page_is_in_the_contents() -> None:
    """Each page of docs/ is found by exactly one pattern of the contents, but for the first."""
    pages = [path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")]
    patterns = [pattern for part in NAVIGATION.values() for pattern in part]
    found = {str(page): sum(fnmatch(str(page), each) for each in patterns) for page in pages}
    assert {page: times for page, times in found.items() if times != 1} == {"index": 0}


def test_every_pattern_of_the_contents_finds_a_page() -> None:
    """No entry of the contents is left over from a page that is gone."""
    made = "reference/*"
    patterns = [each for part in NAVIGATION.values() for each in part if each != made]
    assert [each for each in patterns if not any(DOCS.glob(f"{each}.md"))] == []


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Return a copy of docs/."""
    require(find_spec("furo"), "the extra [site] is not installed: nox -s site", optional=True)
    require(shutil.which("mandoc"), "mandoc is not installed")
    return shutil.copytree(DOCS, tmp_path / "docs")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(docs: Path, tmp_path: Path) -> None:
    """Every page is there, also what the program itself describes."""
    assert main(tmp_path / "site", docs)
    html = tmp_path / "site/html"
    assert 'id="inspect"' in (html / "reference/vmprovision.1.html").read_text("utf-8")
    assert 'id="vmprovision.inject"' in (html / "reference/api.html").read_text("utf-8")
    for page in docs.rglob("*.md"):
        assert (html / page.relative_to(docs).with_suffix(".html")).exists()


@pytest.mark.slow
def test_a_dead_link_is_an_error(
    docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The site is not built with links to pages or headings that do not exist; each is named."""
    dead = ["nowhere.md", "safety.md#nowhere", "#nowhere"]
    with (docs / "tour.md").open("a") as page:
        page.writelines(f"\n[dead]({link})\n" for link in dead)
    assert not main(tmp_path / "site", docs)
    said = capsys.readouterr().err
    assert len(re.findall(r"tour\.md:\d+: WARNING", said)) == len(dead), said


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return where the tour can be taken."""
    (tmp_path / "tour").mkdir()
    yield tmp_path / "tour"
    shutil.rmtree(tmp_path / "tour")


@pytest.mark.slow
@pytest.mark.boot
def test_the_tour_can_be_taken(folder: Path) -> None:
    """The commands of docs/tour.md succeed one after the other, and the agent answers."""
    text = (DOCS / "tour.md").read_text("utf-8")
    script = "set -em\n" + "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    # whether this host's KVM works is not the tour's subject
    script = script.replace("accel=kvm:tcg", "accel=tcg")
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        capture_output=True,
        check=False,
        text=True,
        timeout=TOUR_SECONDS,
        env={**os.environ, "PATH": f"{Path('.venv/bin').absolute()}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.replace(": ", ":")
    assert '"status":"healthy"' in answers
    assert '"vm_id":"tour-1"' in answers
    assert "agent removed" in done.stdout
