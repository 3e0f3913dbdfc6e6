"""Blocks of lines in files that belong to others."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmprovision.changes.blocks import find_blocks, insert_block, marked, strip_blocks
from vmprovision.changes.operations import EditBlock

PATH = PurePosixPath("/etc/rc.local")
LINES = b"( agent ) &\n"
BLOCK = marked("guest-agent", LINES)


def edit(content: bytes = LINES, before: str | None = "exit") -> EditBlock:
    """Return the operation as rc.local gets it."""
    return EditBlock(path=PATH, name="guest-agent", content=content, before=before)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", BLOCK),
        (b"#!/bin/sh\n", b"#!/bin/sh\n" + BLOCK),
        (b"#!/bin/sh\nexit 0\n", b"#!/bin/sh\n" + BLOCK + b"exit 0\n"),
        (b"#!/bin/sh\nexit 0", b"#!/bin/sh\n" + BLOCK + b"exit 0"),
        (b"a\nb", b"a\nb\n" + BLOCK),
        (b"exit 0\nx\nexit 0 \n", b"exit 0\nx\n" + BLOCK + b"exit 0 \n"),
        (b"if x; then\n  exit 0\nfi\n", b"if x; then\n  exit 0\nfi\n" + BLOCK),
        (b"# exit 0\n", b"# exit 0\n" + BLOCK),
        (b"x\nexit 0 # done\n", b"x\n" + BLOCK + b"exit 0 # done\n"),
        (b"x\nexit 0;\t#done", b"x\n" + BLOCK + b"exit 0;\t#done"),
        (b"x\nexit\n\n", b"x\n" + BLOCK + b"exit\n\n"),
        (b"exit_code=0\nexit 0 || true\n", b"exit_code=0\nexit 0 || true\n" + BLOCK),
        (
            b"exit 0 # a\nif x; then\n  exit 0\nfi\nexit 0\n",
            b"exit 0 # a\nif x; then\n  exit 0\nfi\n" + BLOCK + b"exit 0\n",
        ),
        (b"\xff\xfe\nexit 0\n", b"\xff\xfe\n" + BLOCK + b"exit 0\n"),
    ],
)
def test_the_block_stands_where_it_is_reached(before: bytes, after: bytes) -> None:
    """It goes before the last `exit 0` that is no part of something else, else to the end."""
    assert insert_block(edit(), before) == after


@given(st.binary(max_size=200).map(lambda b: b.replace(b"guest-agent", b"")))
def test_inserting_twice_is_inserting_once(content: bytes) -> None:
    """The block is never there twice, whatever the file holds."""
    once = insert_block(edit(), content)
    assert insert_block(edit(), once) == once
    assert len(find_blocks("guest-agent", once)) == 1


@given(st.binary(max_size=200).map(lambda b: b.replace(b"guest-agent", b"")))
def test_stripping_gives_back_the_file(content: bytes) -> None:
    """Taking the block out leaves the file as it was, but for a line feed that it lacked."""
    bare = strip_blocks("guest-agent", insert_block(edit(), content))
    assert bare in (content, content + b"\n")


def test_other_lines_of_the_block_replace_the_old_ones() -> None:
    """An upgrade changes the block's lines in place of adding a second block."""
    old = insert_block(edit(b"old\n"), b"a\nexit 0\n")
    assert (
        insert_block(edit(b"new\n"), old) == b"a\n" + marked("guest-agent", b"new\n") + b"exit 0\n"
    )


def test_an_empty_block_takes_all_of_them_out() -> None:
    """Copies that somebody pasted go as well; another name's block stays."""
    other = marked("other", b"x\n")
    assert insert_block(edit(b""), BLOCK + b"a\n" + other + BLOCK) == b"a\n" + other


def test_a_block_without_its_end_does_not_swallow_the_file() -> None:
    """Somebody deleted the end marker: only the begin marker is ours."""
    cut = BLOCK.replace(b"# END guest-agent\n", b"")
    assert strip_blocks("guest-agent", b"a\n" + cut + b"b\n") == b"a\n" + LINES + b"b\n"


def test_a_marker_inside_a_line_is_no_marker() -> None:
    """Only whole lines count."""
    content = b"echo '" + BLOCK
    assert find_blocks("guest-agent", content) == []
