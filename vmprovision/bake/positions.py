"""Find the line of each key in a TOML file; Python's TOML parsers keep no positions.

A TOML file that is cut after a complete statement is valid TOML. So the file is parsed
up to each of its lines. If that succeeds, a statement is complete, and the new keys
belong to it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

KeyPath = tuple[str | int, ...]


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line on which each key, table and element of a valid TOML file begins.

    Args:
        text: the file's text.  A key is named by its path, as in ``("output", 0, "format")``.
    """
    lines: dict[KeyPath, int] = {}
    begin, before = 1, ""
    for number, line in enumerate(text.split("\n"), 1):
        before += line + "\n"
        try:
            document = tomllib.loads(before)
        except tomllib.TOMLDecodeError:
            continue  # a value on several lines
        for path in _paths(document, ()):
            lines.setdefault(path, begin)
        begin = number + 1
    return lines


def nearest_line(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """Return the line of a key, or of the innermost enclosing table in the file."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return 1


def _paths(value: Any, path: KeyPath) -> Iterator[KeyPath]:  # noqa: ANN401 -- any TOML value
    inner: Iterator[tuple[str | int, Any]] = iter(())
    if isinstance(value, dict):
        inner = iter(value.items())
    elif isinstance(value, list):
        inner = iter(enumerate(value))
    for key, below in inner:
        yield (*path, key)
        yield from _paths(below, (*path, key))
