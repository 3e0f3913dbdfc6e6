"""Text of a hostile guest is parsed in one pass, and bounded."""

from __future__ import annotations

import pytest

from tests.hostile.texts import BEGIN
from vmprovision.changes.blocks import find_blocks, marked, strip_blocks
from vmprovision.guest.shelltext import VALUE_LIMIT, assigned_value


@pytest.mark.parametrize("count", [1, 50_000])
def test_blocks_are_found_in_one_pass(count: int) -> None:
    """Each line is read once, however many begin markers there are."""
    block = marked("guest-agent", b"x\n")
    content = BEGIN * count + b"other\n" + block
    assert len(find_blocks("guest-agent", content)) == count + 1
    assert strip_blocks("guest-agent", content) == b"other\n"


def test_a_value_is_bounded() -> None:
    """Variables that grow with each line stop at the limit."""
    value = "x" * 100
    for _ in range(20):
        value = assigned_value('"$a$a$a$a"', {"a": value})
    assert len(value) == VALUE_LIMIT
