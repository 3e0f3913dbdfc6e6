"""What is wrong with a repository as such: conflict markers, dead links in its pages."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require

REPOSITORY = Path(__file__).resolve().parents[1]
MARKER = re.compile(rb"^(?:<{7} |={7}$|>{7} )", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)|\]\(#([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def tracked(*patterns: str) -> list[Path]:
    """The files that git tracks, by these patterns."""
    require((REPOSITORY / ".git").exists(), "this is no checkout")
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z", *patterns]
    listed = subprocess.run(command, check=True, capture_output=True).stdout
    return [REPOSITORY / name for name in listed.decode().split("\0") if name]


def test_no_conflict_markers() -> None:
    """A merge that was not finished is not committed."""
    left = [path for path in tracked() if path.is_file() and MARKER.search(path.read_bytes())]
    assert [str(path) for path in left] == []


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as a forge makes them."""
    headings = HEADING.findall(re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL))
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {word.replace(" ", "-") for word in words}


@pytest.mark.parametrize("page", ["*.md", "docs/**/*.md"])
def test_no_dead_links(page: str) -> None:
    """Every link of a page to a file or a heading of this repository leads somewhere."""
    dead = []
    for path in tracked(page):
        for match in LINK.finditer(CODE.sub("", path.read_text("utf-8"))):
            target, heading = match[1] or "", match[2] or match[3]
            if target.startswith(("http:", "https:", "mailto:")):
                continue
            there = path.parent / target if target else path
            if not there.exists() or (heading and heading not in anchors(there)):
                dead.append(f"{path.relative_to(REPOSITORY)}: {match[0]}")
    assert dead == []
