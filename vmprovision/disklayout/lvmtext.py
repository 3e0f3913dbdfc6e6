"""Parse LVM2's metadata text: nested sections, numbers, strings, lists.

The grammar is that of lvm.conf(5). The text comes from a guest's disk, so its length,
its depth and the length of its numbers are limited.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeAlias

from vmprovision.disklayout.partitions import UnclearLayoutError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Value: TypeAlias = "int | str | list[Value] | Section"
Section: TypeAlias = "Mapping[str, Value]"

TEXT_LIMIT = 4 << 20
_DEPTH_LIMIT = 8
_TOKEN = re.compile(
    r"""(?:\s+|\#[^\n]*)*
    (?:(?P<string>"(?:[^"\\]|\\.)*")
      |(?P<number>-?\d{1,19}(?![\d.A-Za-z_]))
      |(?P<name>[A-Za-z0-9_.+-]+)
      |(?P<mark>[{}\[\]=,])
      |(?P<end>\Z)
      |(?P<other>.))""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def parse_text(text: str) -> Section:
    """Return the sections and values of a text, by name.

    Raises:
        UnclearLayoutError: the text is malformed, too long or nested too deeply.
    """
    if len(text) > TEXT_LIMIT:
        raise UnclearLayoutError("the LVM metadata is too long")
    return _parse_section(_split_tokens(text), 0)


def _split_tokens(text: str) -> Iterator[tuple[str, str]]:
    """Yield kind and text of each token; the last token has the kind ``end``."""
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup)
        yield kind, match[kind]
        if kind == "end":
            return


def _parse_section(tokens: Iterator[tuple[str, str]], depth: int) -> Section:
    """Return the content of a section, up to the brace or the end that closes it."""
    if depth > _DEPTH_LIMIT:
        raise _malformed()
    found: dict[str, Value] = {}
    for kind, name in tokens:
        if (kind, name) == (("mark", "}") if depth else ("end", "")):
            return found
        if kind not in ("name", "number", "string") or name in found:
            raise _malformed()
        mark = next(tokens, ("end", ""))[1]
        if mark == "{":
            found[name] = _parse_section(tokens, depth + 1)
        elif mark == "=":
            found[name] = _parse_value(tokens, next(tokens, ("end", "")), depth)
        else:
            raise _malformed()
    raise _malformed()


def _parse_value(tokens: Iterator[tuple[str, str]], first: tuple[str, str], depth: int) -> Value:
    """Return the value that begins with this token."""
    kind, text = first
    if depth > _DEPTH_LIMIT:
        raise _malformed()
    if kind == "number":
        return int(text)
    if kind == "name":
        return text
    if kind == "string":
        return _ESCAPE.sub(r"\1", text[1:-1])
    if text != "[":
        raise _malformed()
    values: list[Value] = []
    for token in tokens:
        if token == ("mark", "]"):
            return values
        if token != ("mark", ","):
            values.append(_parse_value(tokens, token, depth + 1))
    raise _malformed()


def _malformed() -> UnclearLayoutError:
    return UnclearLayoutError("the LVM metadata is malformed")
