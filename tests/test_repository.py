"""Check the repository itself: its pages, its test data, and how tests are skipped."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from tests.conftest import require

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY / "tests/data"
PARAGRAPH_LIMIT = 700
MARKER = re.compile(rb"^(?:<{7} |={7}$|>{7} )", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)|\]\(#([^)\s]+)\)")
FENCE = re.compile(r"```.*?```", re.DOTALL)
QUOTED = re.compile(r"`([^`\n]+)`")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SKIP = re.compile(r"pytest\.(?:skip|importorskip)\(|mark\.skip")
# the folders of the repository that pages cite by path
ROOMS = r"(?:vmprovision|tests|docs|images|templates|\.ci|\.github)"
PATH = re.compile(rf"{ROOMS}/[\w.@/+-]+|[\w/-]+\.(?:py|md|j2|toml)|[A-Z]{{2,}}\.md")
# what pages name and only exists elsewhere, or later
ELSEWHERE = {
    "batch.py",  # an example that users write
    "orchestrator.py",  # likewise
    "compat.py",  # cited in the agent's own folder
    "images/DISTRIBUTION-NAME/recipe.toml",
    "vmprovision/initsystem/NAME.py",
    "initsystem/NAME.py",
    "templates/NAME/",
    "recipe.toml",
    "os.py",  # of a guest's Python
    "zipboot.py",
}
# How this project does not write: issue by issue, sentences that no reader understood at once.
RIDDLES = (
    "lies otherwise",
    "at once are none",
    "makes of a job",
    "takes none any more",
    "looked at without need",
    "run left dealt with",
    "waited for in vain",
    "who may push him out",
    "puts a running guest agent",
)


def tracked(*patterns: str) -> list[Path]:
    """Return the files that git tracks, by these patterns."""
    require((REPOSITORY / ".git").exists(), "this is not a git checkout", optional=True)
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z", *patterns]
    listed = subprocess.run(command, check=True, capture_output=True).stdout
    paths = [REPOSITORY / name for name in listed.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def pages() -> list[Path]:
    """Return every page of the documentation."""
    return [path for path in tracked("*.md") if DATA / "trees" not in path.parents]


def named(path: Path) -> str:
    """Return a path as people write it, from the repository's root."""
    return str(path.relative_to(REPOSITORY))


def test_no_conflict_markers() -> None:
    """An unfinished merge is not committed."""
    left = [named(path) for path in tracked() if MARKER.search(path.read_bytes())]
    assert left == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as a forge makes them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text("utf-8")))
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {word.replace(" ", "-") for word in words}


def test_no_dead_links() -> None:
    """Every link of a page to a file or a heading of this repository leads somewhere."""
    dead = []
    for path in pages():
        for match in LINK.finditer(QUOTED.sub("", FENCE.sub("", path.read_text("utf-8")))):
            target, heading = match[1] or "", match[2] or match[3]
            if target.startswith(("http:", "https:", "mailto:")):
                continue
            there = path.parent / target if target else path
            if not there.exists() or (heading and heading not in anchors(there)):
                dead.append(f"{named(path)}: {match[0]}")
    assert dead == []


def test_every_cited_file_exists() -> None:
    """A path in backticks is that of a file or folder of this repository."""
    files = {named(path) for path in tracked()}
    folders = {str(folder) for file in files for folder in PurePosixPath(file).parents}
    there = files | folders
    absent = []
    for page in pages():
        for cited in QUOTED.findall(FENCE.sub("", page.read_text("utf-8"))):
            path = cited.rstrip("/")
            if not PATH.fullmatch(path) or cited in ELSEWHERE or path in ELSEWHERE:
                continue
            places = (path, f"vmprovision/{path}", f"vmprovision/appliance/{path}", f"docs/{path}")
            if not any(place in there for place in places):
                absent.append(f"{named(page)}: {cited}")
    assert absent == []


def paragraphs(page: Path) -> list[str]:
    """Return a page's paragraphs, list items and table cells, with links reduced to their text."""
    text = re.sub(r"\]\([^)]*\)", "]", FENCE.sub("\n\n", page.read_text("utf-8")))
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.)\s?)", text)
    return [cell for block in blocks for cell in (block.split(" | ") if "|" in block else [block])]


def test_paragraphs_are_short() -> None:
    """No paragraph, list item or table cell of a page is too long to be read at once."""
    long = [
        f"{named(page)}: {paragraph[:60]}... ({len(paragraph)})"
        for page in pages()
        for paragraph in paragraphs(page)
        if len(paragraph) >= PARAGRAPH_LIMIT
    ]
    assert long == []


def test_no_riddles() -> None:
    """Sentences that were rewritten because nobody understood them do not come back."""
    found = [
        f"{named(path)}: {riddle}"
        for path in tracked("*.md", "tests/*.py")
        if path != Path(__file__)
        for riddle in RIDDLES
        if riddle in " ".join(path.read_text("utf-8").split())
    ]
    assert found == []


def test_every_skip_goes_through_require() -> None:
    """A test that skips by itself would let CI pass without having run it."""
    own = [
        named(path)
        for path in tracked("tests/*.py")
        if path not in {REPOSITORY / "tests/conftest.py", Path(__file__)}
        and SKIP.search(path.read_text("utf-8"))
    ]
    assert own == []


@pytest.mark.parametrize("folder", ["trees", "release-files"])
def test_data_holds_no_secrets(folder: str) -> None:
    """The files of real guests have no accounts, keys or host names in them."""
    suspicious = re.compile(rb"PRIVATE KEY|ssh-(?:rsa|ed25519) |\$[156y]\$[\w./]+\$")
    private = {"passwd", "shadow", "group", "hostname", "hosts", "resolv.conf", "machine-id"}
    files = [path for path in (DATA / folder).rglob("*") if path.is_file()]
    assert files
    of_etc = [path for path in files if path.parent.name == "etc"]
    assert [named(path) for path in of_etc if path.name in private] == []
    assert [named(path) for path in files if suspicious.search(path.read_bytes())] == []
