"""Evaluate the conditions of GRUB's scripts offline (GNU GRUB manual, "test")."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WORDS_LIMIT = 50
_UNKNOWN = "\0"
_FILE_TESTS = ("-e", "-f", "-s")
_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": lambda a, b: a == b,
    "-ne": lambda a, b: a != b,
    "-lt": lambda a, b: a < b,
    "-le": lambda a, b: a <= b,
    "-gt": lambda a, b: a > b,
    "-ge": lambda a, b: a >= b,
}


def holds(words: Sequence[tuple[str, ...]], is_there: Callable[[str], bool | None]) -> bool | None:
    """Return whether a condition holds, or None if that is unknown offline.

    Args:
        words: the command's words, each with every value that it may have.
        is_there: returns whether a path of the boot loader is a file, or None if unknown.
    """
    known = [values[0] for values in words if len(values) == 1 and _UNKNOWN not in values[0]]
    if len(known) != len(words) or not known or len(known) > WORDS_LIMIT:
        return None
    if known in (["true"], ["false"]):
        return known == ["true"]
    if known[0] == "[" and known[-1] == "]":
        return _either(known[1:-1], is_there)
    return _either(known[1:], is_there) if known[0] == "test" else None


def _either(words: list[str], is_there: Callable[[str], bool | None]) -> bool | None:
    """Return whether one of the parts between ``-o`` holds; ``-a`` binds tighter."""
    verdicts = [_both(part, is_there) for part in _split(words, "-o")]
    return True if True in verdicts else None if None in verdicts else False


def _both(words: list[str], is_there: Callable[[str], bool | None]) -> bool | None:
    verdicts = [_one(part, is_there) for part in _split(words, "-a")]
    return False if False in verdicts else None if None in verdicts else True


def _split(words: list[str], at: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == at:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _one(words: list[str], is_there: Callable[[str], bool | None]) -> bool | None:
    if words[:1] == ["!"]:
        verdict = _one(words[1:], is_there)
        return None if verdict is None else not verdict
    match words:
        case [] | ["-n", ""]:
            verdict = False
        case ["-z", text]:
            verdict = not text
        case [text] | ["-n", text]:
            verdict = bool(text)
        case [kind, path] if kind in _FILE_TESTS:
            return is_there(path)
        case [left, "=" | "==", right]:
            verdict = left == right
        case [left, "!=", right]:
            verdict = left != right
        case [left, kind, right] if kind in _NUMBERS and left.isdecimal() and right.isdecimal():
            verdict = _NUMBERS[kind](int(left[:20]), int(right[:20]))
        case _:
            return None
    return verdict
