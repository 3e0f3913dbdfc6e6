"""Blocks: lines that vmprovision adds to a guest's file, between two markers that name them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.changes.operations import EditBlock


def marked(name: str, content: bytes) -> bytes:
    """Return the lines of a block between its two markers."""
    begin, end = _markers(name)
    return begin + content + end


def find_blocks(name: str, content: bytes) -> list[tuple[int, int]]:
    """Return the blocks of this name in a file as (start, end) offsets, markers included.

    A begin marker without an end marker is a block up to the next begin marker or the
    end of its own line. Another program has cut it, and lines after it may not belong
    to it.
    """
    begin, end = _markers(name)
    starts, stops = _line_offsets(content, begin), _line_offsets(content, end)
    found = []
    stop = next(stops, None)
    for start, following in pairwise([*starts, len(content)]):
        after = start + len(begin)
        while stop is not None and stop < after:
            stop = next(stops, None)
        whole = stop is not None and stop < following
        found.append((start, stop + len(end) if whole and stop is not None else after))
    return found


def insert_block(edit: EditBlock, content: bytes) -> bytes:
    """Return a file's content with the block in it once, at the place that the operation names."""
    bare = strip_blocks(edit.name, content)
    if not edit.content:
        return bare
    block = marked(edit.name, edit.content)
    lines = bare.splitlines(keepends=True)
    places = [index for index, line in enumerate(lines) if _is_command(line, edit.before)]
    place = places[-1] if places else len(lines)
    head, tail = b"".join(lines[:place]), b"".join(lines[place:])
    if head and not head.endswith(b"\n"):
        head += b"\n"
    return head + block + tail


def _is_command(line: bytes, command: str | None) -> bool:
    """Return whether a script's line is this command, not indented."""
    words = line.split(b"#")[0].replace(b";", b" ").split()
    wanted = (command or "").encode()
    return words[:1] == [wanted] and not words[2:] and line.startswith(wanted)


def strip_blocks(name: str, content: bytes) -> bytes:
    """Return a file's content without any block of this name."""
    left, position = [], 0
    for start, end in find_blocks(name, content):
        left.append(content[position:start])
        position = end
    return b"".join([*left, content[position:]])


def _markers(name: str) -> tuple[bytes, bytes]:
    return (
        f"# BEGIN {name} (added by vmprovision; remove it with `vmprovision remove`)\n".encode(),
        f"# END {name}\n".encode(),
    )


def _line_offsets(content: bytes, line: bytes) -> Iterator[int]:
    """Yield each offset at which this text is a whole line."""
    position = -1
    while (position := content.find(line, position + 1)) >= 0:
        if position == 0 or content[position - 1 : position] == b"\n":
            yield position
