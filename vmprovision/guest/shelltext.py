"""Shell assignments in guest text, read as a shell reads them and never run.

Quoting is that of POSIX shells ("Quoting", XCU 2.2), to which os-release(5),
``/etc/default/grub`` and ``/etc/selinux/config`` keep.  Guest text is hostile: each
character is looked at once, and what comes out is bounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VALUE_LIMIT = 16 << 10
_ESCAPED_IN_DOUBLE = '$`"\\'


def parse_assignments(
    text: str, variables: Mapping[str, str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield name and value of each ``NAME=value`` line, in order.

    Args:
        text: of a file; lines of any other form are passed over.
        variables: what ``$NAME`` stands for at the time when its line is reached;
            without, a ``$`` is an ordinary character.
    """
    for line in text.splitlines():
        before, equals, raw = line.partition("=")
        *export, name = before.split() or [""]
        if equals and name.isascii() and name.isidentifier() and export in ([], ["export"]):
            yield name, assigned_value(raw.strip(), variables)


def assigned_value(raw: str, variables: Mapping[str, str] | None = None) -> str:
    """Return the value that ``NAME=raw`` gives, at most ``VALUE_LIMIT`` characters of it.

    Two things are taken that a shell would not take: blanks outside quotes, and a
    quote that the line does not close.
    """
    raw = raw[:VALUE_LIMIT]
    found: list[str] = []
    size, at, quote = 0, 0, ""
    while at < len(raw) and size < VALUE_LIMIT:
        char, after = raw[at], raw[at + 1 : at + 2]
        at += 1
        if char == quote:
            quote, char = "", ""
        elif not quote and char in "\"'":
            quote, char = char, ""
        elif not quote and char == "#" and raw[at - 2 : at - 1] in ("", " ", "\t"):
            break
        elif char == "\\" and (not quote or (quote == '"' and after in _ESCAPED_IN_DOUBLE)):
            char = after
            at += 1
        elif char == "$" and quote != "'" and variables is not None:
            name, at = _variable(raw, at)
            char = variables.get(name, "")
        found.append(char)
        size += len(char)
    return "".join(found)[:VALUE_LIMIT].rstrip()


def _variable(raw: str, at: int) -> tuple[str, int]:
    """Return the name behind a ``$``, and where what follows it begins."""
    if raw[at : at + 1] == "{":
        end = raw.find("}", at)
        return (raw[at + 1 : end], end + 1) if end > 0 else ("", len(raw))
    end = at
    while end < len(raw) and raw[end].isascii() and (raw[end].isalnum() or raw[end] == "_"):
        end += 1
    return raw[at:end], end


def without_comments(text: str) -> list[str]:
    """Return the lines of a script or table, each up to its first ``#``, the empty ones left out.

    A ``#`` may not be a comment; then less of the line is seen, and never more.
    """
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]
