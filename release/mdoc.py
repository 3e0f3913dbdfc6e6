"""Write manual pages in mdoc(7), from plain text and the Markdown of our own pages."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WIDTH = 78
SENTENCE_END = re.compile(r"""(?:(?<=[a-z0-9)`'"*][.!?])|(?<=[A-Z]{2}[.!?]))\s+(?=[A-Z`(])""")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
QUOTES = re.compile(r"``?([^`]+)``?")


class Page:
    """A manual page, written from its beginning to its end."""

    def __init__(self, name: str, section: int, summary: str, date: str) -> None:
        """Begin the page with its title and its section NAME.

        Args:
            name: of what it describes.
            section: of the manual.
            summary: of it in a few words, without a full stop.
            date: as mdoc(7) has it, such as ``January 1, 2026``.
        """
        self.lines = [f".Dd {date}", f".Dt {name.upper()} {section}", ".Os"]
        self.section("NAME")
        self.lines += [f".Nm {name}", f".Nd {_plain(summary)}"]

    def section(self, title: str) -> None:
        """Begin a section."""
        self.lines.append(f".Sh {title}")

    def subsection(self, title: str) -> None:
        """Begin a subsection."""
        self.lines.append(f".Ss {_escaped(title)}")

    def macro(self, name: str, *arguments: str) -> None:
        """Add a macro whose arguments are words of ours, other macros among them."""
        self.lines.append(" ".join((f".{name}", *arguments)))

    def text(self, text: str) -> None:
        """Add paragraphs, which empty lines separate; each sentence begins a line."""
        for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
            if number:
                self.lines.append(".Pp")
            for sentence in SENTENCE_END.split(_plain(paragraph)):
                self.lines += [_escaped(line) for line in _wrapped(sentence)]

    def items(self, items: Iterable[tuple[Sequence[str], str]]) -> None:
        """Add a list: each item's macros and words, and its text. No list if it has no items."""
        written = list(items)
        if not written:
            return
        self.lines.append(".Bl -tag -width Ds")
        for words, text in written:
            self.macro("It", *words)
            self.text(text)
        self.lines.append(".El")

    def example(self, text: str) -> None:
        """Add lines that are shown as they are."""
        self.lines += [".Bd -literal -offset indent"]
        self.lines += [_escaped(line) for line in text.strip("\n").splitlines()]
        self.lines += [".Ed"]

    def __str__(self) -> str:
        """Return the page's source."""
        return "\n".join(self.lines) + "\n"


def word(text: str) -> str:
    """Return text as one argument of a macro, which is not taken for a macro itself."""
    escaped = text.replace("\\", "\\e").replace('"', "\\(dq")
    return f'"{escaped}"' if " " in text else f"\\&{escaped}"


def _plain(text: str) -> str:
    """Return Markdown's text on one line: links by their text, code without its quotes."""
    return " ".join(QUOTES.sub(r"\1", LINK.sub(r"\1", text)).replace("**", "").split())


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _escaped(line: str) -> str:
    """Return a line in which roff(7) sees no requests, and hyphens of options stay hyphens."""
    line = re.sub(r"(?<![\w.])-(?=[\w-])|(?<=-)-(?=\w)", r"\\-", line.replace("\\", "\\e"))
    return f"\\&{line}" if line.startswith((".", "'")) else line
