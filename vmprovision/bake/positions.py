"""On which line of a TOML file each key is; the parsers of Python keep no positions.

A TOML file that is cut after a complete statement is a TOML file.  So the file is
parsed up to each of its lines: where that succeeds a statement is complete, and the
keys that are new belong to it.
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
        text: the file; a key is named by its path, as ``("output", 0, "format")``.
    """
    lines: dict[KeyPath, int] = {}
    begin, before = 1, ""
    for number, line in enumerate(text.split("\n"), 1):
        before += line + "\n"
        try:
            document = tomllib.loads(before)
        except tomllib.TOMLDecodeError:
            continue  # a value of several lines
        for path in _paths(document, ()):
            lines.setdefault(path, begin)
        begin = number + 1
    return lines


def nearest_line(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """Return the line of a key, or of the innermost table around it that is in the file."""
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
