"""Patterns: what they match, and that no guest can keep us busy with one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmprovision.selinux.pathpattern import Effort, PatternError, matches

ATOMS = st.sampled_from(
    ["a", "b", "/", ".", r"\.", "[ab]", "[^a]", "[^/]", "[a-c]", r"\d", r"[.\-0-9]", "[]a]", "[a-]"]
)
REPETITIONS = st.sampled_from(["", "", "", "?", "*", "+", "{2}", "{1,2}", "{0,}", "*?", "{", "]"])


def _joined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeated = st.tuples(parts, REPETITIONS).map("".join)
    return st.lists(repeated, min_size=1, max_size=4).map("".join)


def _grouped(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    halves = st.lists(_joined(parts), min_size=1, max_size=3).map("|".join)
    return st.tuples(st.sampled_from(["(", "(?:"]), halves, st.just(")")).map("".join)


PATTERNS = _joined(st.recursive(ATOMS, _grouped, max_leaves=8))


@given(PATTERNS, st.text(alphabet="ab/.1-c{]", max_size=12))
def test_answers_are_those_of_a_regular_expression(pattern: str, path: str) -> None:
    """Where the whole path decides, every implementation of these patterns agrees."""
    expected = re.fullmatch(pattern, path, re.DOTALL | re.ASCII) is not None
    assert matches(pattern, path, Effort()) is expected


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a)\1",
        "(?=a)a",
        "(?!b)a",
        "(?P<n>a)",
        "(?i)a",
        "(?>a)",
        "a++",
        "a*+",
        "a**",
        r"\bA",
        r"\x41",
        r"\Qa\E",
        "[[:alpha:]]",
        r"[\D]",
        "a|b",
        "(a",
        "a)",
        "[a",
        "[b-a]",
        "*a",
        "\\",
        "(" * 100 + "a" + ")" * 100,
        "a" * 5000,
    ],
)
def test_what_is_not_understood_is_an_error(pattern: str) -> None:
    """An unsupported pattern is an error, so that the guest's own tools are used."""
    with pytest.raises(PatternError):
        matches(pattern, "a", Effort())


@pytest.mark.parametrize(
    "pattern",
    [
        "(a*)*b",
        "(a|a)*b",
        "(a|aa)+b",
        "(.*)*(.*)*(.*)*b",
        ".*" * 200 + "b",
        "((a{0,9999}){0,9999}){0,9999}b",
        "((((a?){9999}){9999}){9999}){9999}b",
        "(((a*)*)*)*b",
        "(((a|b)*(b|a)*)*((a|b)*)*)*c",
    ],
)
def test_no_pattern_takes_long(pattern: str) -> None:
    """A pattern that would keep a backtracking matcher busy for years is answered or refused."""
    effort = Effort()
    try:
        assert not matches(pattern, "a" * 200, effort)
    except PatternError as exc:
        assert "too long" in str(exc)  # noqa: PT017 -- one of two right ends


def test_the_effort_is_for_all_patterns_of_a_question() -> None:
    """Many patterns that each take a little are given up, too."""
    effort = Effort(left=1000)
    answers = (matches("a*b*c", "aaaabbbb", effort) for _ in range(1000))
    with pytest.raises(PatternError, match="too long"):
        any(answers)
