"""Read shell assignments in guest text without running a shell.

Quoting is that of POSIX shells ("Quoting", XCU 2.2), which os-release(5),
``/etc/default/grub`` and ``/etc/selinux/config`` follow. Guest text is hostile: each
character is read once, and the output is limited.
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
        text: a file's text; lines of another form are skipped.
        variables: the values of ``$NAME``, looked up when its line is reached. Without
            variables, a ``$`` is an ordinary character.
    """
    for line in text.splitlines():
        before, equals, raw = line.partition("=")
        *export, name = before.split() or [""]
        if equals and name.isascii() and name.isidentifier() and export in ([], ["export"]):
            yield name, assigned_value(raw.strip(), variables)


def assigned_value(raw: str, variables: Mapping[str, str] | None = None) -> str:
    """Return the value of ``NAME=raw``, at most ``VALUE_LIMIT`` characters of it.

    Unlike a shell, this accepts blanks outside quotes, and a quote that the line does
    not close.
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
    """Return the name after a ``$``, and the offset after it."""
    if raw[at : at + 1] == "{":
        end = raw.find("}", at)
        return (raw[at + 1 : end], end + 1) if end > 0 else ("", len(raw))
    end = at
    while end < len(raw) and raw[end].isascii() and (raw[end].isalnum() or raw[end] == "_"):
        end += 1
    return raw[at:end], end


def without_comments(text: str) -> list[str]:
    """Return the non-empty lines of a script or table, each up to its first ``#``.

    A ``#`` may not be a comment. Then less of the line is returned, never more.
    """
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]
