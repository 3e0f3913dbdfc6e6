"""The page of the support matrix: its rows, and their summary, which the README has too."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs/support-matrix.md"
README = REPOSITORY / "README.md"
FAILED = "**failed**"
REFUSED = "refused"
EMPTY = "\N{EN DASH}"
BEGIN, END = "<!-- nox -s boot-matrix writes this -->", "<!-- until here -->"
HEAD = """\
# Support matrix

`nox -s boot-matrix` writes this page: edit `tests/proof/page.py` instead. {sources}

{summary}
## Each guest

- **booted**: the image of a recipe in `images/` was built, injected and started, and \
`vmprovision prove` saw the agent answer under that init system. The seconds are from \
power-on to its first answer, {speed}; the host may have had other work.
- **files checked**: the verdict and the planned files are right on real files of that guest, or \
on its layout as its makers document it. Nothing was booted.
- **refused**: `inject` changes nothing, and its message is in the last column. If it prints a \
service to add and that guest was booted with it, the column says so, too.
- **failed**, **not booted**, **not tried**: the last column has the reason.
- **commit**: that of vmprovision's sources; `+` means with changes.

| guest | architecture | services run by | process 1 | agent's runtime | result | commit | how |
|---|---|---|---|---|---|---|---|
"""
ONE_COMMIT = "Every boot was made with the sources of commit {}."
SEVERAL_COMMITS = "The boots were made with the sources of several commits."
SUMMARY = """\
| guest | architecture | booted with | only files checked with |
|---|---|---|---|
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One guest in the table."""

    guest: str = EMPTY
    arch: str = EMPTY
    system: str = EMPTY
    pid1: str = EMPTY
    runtime: str = EMPTY
    result: str
    commit: str = EMPTY
    how: str

    def as_markdown(self) -> str:
        """Return the row as a line of the table."""
        return _line(getattr(self, field.name) for field in fields(self))


def rows_on_page() -> list[Row]:
    """Return the rows that the page has now."""
    names = [field.name for field in fields(Row)]
    rows = []
    for line in PAGE.read_text(encoding="utf-8").partition("# Each guest")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == len(names):
            rows.append(Row(**dict(zip(names, cells, strict=True))))
    return rows[1:]  # the first one is the table's head


def sources_of(rows: Iterable[Row]) -> str:
    """Return a sentence that says with which sources the guests were booted."""
    commits = {row.commit for row in rows if row.result == "booted"}
    several = len(commits) != 1 or EMPTY in commits
    return SEVERAL_COMMITS if several else ONE_COMMIT.format(*commits)


def summarise(rows: Sequence[Row]) -> str:
    """Return a table with a line for each guest and architecture: which init systems, and how."""
    lines: dict[tuple[str, str], dict[str, set[str]]] = {}
    for row in rows:
        if row.result in {"booted", "files checked"}:
            found = lines.setdefault(
                (row.guest, row.arch), {"booted": set(), "files checked": set()}
            )
            found[row.result].add(row.system)
    table = [
        _line(
            (
                guest,
                arch,
                ", ".join(sorted(booted)) or EMPTY,
                ", ".join(sorted(found.get("files checked", set()) - booted)) or EMPTY,
            )
        )
        for (guest, arch), found in lines.items()
        for booted in (found.get("booted", set()),)
    ]
    return SUMMARY + "".join(table)


def write_page(rows: Sequence[Row], *, speed: str) -> None:
    """Write the page, and the README's table.

    Args:
        rows: all rows.
        speed: how fast the guests ran, in words.
    """
    summary = summarise(rows)
    head = HEAD.format(speed=speed, sources=sources_of(rows), summary=summary)
    PAGE.write_text(head + "".join(row.as_markdown() for row in rows), encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{summary}{END}{after}", encoding="utf-8")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
