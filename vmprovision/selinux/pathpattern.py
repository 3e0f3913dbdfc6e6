"""Match the regular expressions of file_contexts(5) in bounded time.

The patterns come from guests, and a hostile one can keep Python's ``re`` busy for ever.
So this module matches them itself. It supports the part of PCRE (pcre2pattern(3)) that
describes regular languages, which policies use. Whether such a pattern matches a whole
path does not depend on greediness, so there is no backtracking: all reachable positions
are followed at once, as the bits of one integer. Every step is counted. Too many steps
are an error, and so is unsupported syntax.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

EFFORT = 200_000  # steps of less than a microsecond; Debian's policy takes at most 10,000
LENGTH_LIMIT = 4096
NESTING_LIMIT = 30

_DIGITS = frozenset(string.digits)
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_SPACE = frozenset(" \t\n\v\f\r")
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_REPETITIONS: dict[str, tuple[int, int | None]] = {"?": (0, 1), "*": (0, None), "+": (1, None)}
_REPETITION = re.compile(r"\{(\d{1,5})(?:(,)(\d{1,5})?)?\}")


class PatternError(ValueError):
    """The pattern is not supported here, or takes too many steps."""


@dataclass(slots=True)
class Effort:
    """The number of steps left for one question, over all its patterns."""

    left: int = EFFORT

    def spend(self, steps: int) -> None:
        """Count steps.

        Raises:
            PatternError: no steps are left.
        """
        self.left -= steps
        if self.left < 0:
            raise PatternError("the patterns take too long to match")


@dataclass(frozen=True, slots=True)
class _Subject:
    """A path to match: for each character its positions, as bits."""

    positions: dict[str, int]
    size: int
    effort: Effort


# From the positions at which a part of a pattern begins to those at which it can end.
_Matcher = Callable[[_Subject, int], int]


def matches(pattern: str, path: str, effort: Effort) -> bool:
    """Return whether the pattern matches the whole path.

    Raises:
        PatternError: the pattern is not supported, or too costly to match.
    """
    effort.spend(len(pattern) + len(path))
    positions: dict[str, int] = {}
    for index, character in enumerate(path):
        positions[character] = positions.get(character, 0) | 1 << index
    subject = _Subject(positions, len(path), effort)
    return bool(_Parser(pattern).parse()(subject, 1) >> len(path) & 1)


class _Parser:
    """A recursive-descent parser that turns a pattern into a matcher."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.nesting = 0

    def parse(self) -> _Matcher:
        if len(self.pattern) > LENGTH_LIMIT:
            self._refuse("is too long")
        matcher = self._sequence()
        if self._next() == "|":
            # libselinux puts ^ and $ around it, so each half would lose one of them
            self._refuse("has alternatives outside parentheses")
        if self.at < len(self.pattern):
            self._refuse("has an unmatched parenthesis")
        return matcher

    def _next(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def _take(self) -> str:
        character = self._next() or self._refuse("ends too early")
        self.at += 1
        return character

    def _refuse(self, what: str) -> NoReturn:
        raise PatternError(f"the pattern {self.pattern[:80]!r} {what}")

    def _alternatives(self) -> _Matcher:
        found = [self._sequence()]
        while self._next() == "|":
            self.at += 1
            found.append(self._sequence())
        return found[0] if len(found) == 1 else _any_of(found)

    def _sequence(self) -> _Matcher:
        parts = []
        while self._next() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return parts[0] if len(parts) == 1 else _one_after_another(parts)

    def _atom(self) -> _Matcher:
        character = self._take()
        if character == "(":
            return self._group()
        if character == "[":
            return self._set()
        if character == ".":
            return _one_of(frozenset(), negated=True)
        if character == "\\":
            return self._escape()
        if character in "^$":
            return _at_start if character == "^" else _at_end
        if character in "*+?":
            self._refuse("repeats nothing")
        return _one_of(frozenset(character))

    def _group(self) -> _Matcher:
        self.nesting += 1
        if self.nesting > NESTING_LIMIT:
            self._refuse("is nested too deeply")
        if self._next() == "?":
            if not self.pattern.startswith("?:", self.at):
                self._refuse("has an unsupported kind of group")
            self.at += 2
        matcher = self._alternatives()
        if self._take() != ")":
            self._refuse("has an unmatched parenthesis")
        self.nesting -= 1
        return matcher

    def _escape(self) -> _Matcher:
        characters, negated = self._escaped()
        return _one_of(characters, negated=negated)

    def _escaped(self) -> tuple[frozenset[str], bool]:
        character = self._take()
        if character.lower() in _CLASSES:
            return _CLASSES[character.lower()], character.isupper()
        if character.isalnum():
            self._refuse(f"has \\{character}, which is not supported")
        return frozenset(character), False

    def _set(self) -> _Matcher:
        negated = self._next() == "^"
        self.at += negated
        found: set[str] = set()
        first = True
        while first or self._next() != "]":
            first = False
            low = self._member()
            if len(low) == 1 and re.match(r"-[^]]", self.pattern[self.at : self.at + 2]):
                self.at += 1
                low = self._range(low, self._member())
            found |= low
        self.at += 1
        return _one_of(frozenset(found), negated=negated)

    def _member(self) -> frozenset[str]:
        character = self._take()
        if character == "\\":
            characters, negated = self._escaped()
            if negated:
                self._refuse("negates a class inside a set")
            return characters
        if character == "[" and self._next() in (":", ".", "="):
            self._refuse("has a named class")
        return frozenset(character)

    def _range(self, low: frozenset[str], high: frozenset[str]) -> frozenset[str]:
        first, last = min(low), min(high)
        if len(high) != 1 or first > last:
            self._refuse("has an empty range")
        return frozenset(map(chr, range(ord(first), min(ord(last), 255) + 1)))

    def _repeated(self, matcher: _Matcher) -> _Matcher:
        counted = _REPETITION.match(self.pattern, self.at)
        if self._next() in _REPETITIONS:
            least, most = _REPETITIONS[self._take()]
        elif counted:
            self.at = counted.end()
            least = int(counted[1])
            most = int(counted[3]) if counted[3] else None if counted[2] else least
        else:
            return matcher
        if self._next() == "?":  # lazy: another order of trying, the same language
            self.at += 1
        if self._next() in _REPETITIONS or _REPETITION.match(self.pattern, self.at):
            self._refuse("repeats a repetition")
        return _repeat(matcher, least, most)


def _one_of(characters: frozenset[str], *, negated: bool = False) -> _Matcher:
    def match(subject: _Subject, starts: int) -> int:
        subject.effort.spend(1 + len(characters))
        found = 0
        for character in characters:
            found |= subject.positions.get(character, 0)
        if negated:
            found = ~found & (1 << subject.size) - 1
        return (starts & found) << 1

    return match


def _at_start(_subject: _Subject, starts: int) -> int:
    return starts & 1


def _at_end(subject: _Subject, starts: int) -> int:
    return starts & 1 << subject.size


def _one_after_another(parts: list[_Matcher]) -> _Matcher:
    def match(subject: _Subject, starts: int) -> int:
        for part in parts:
            subject.effort.spend(1)
            if not starts:
                break
            starts = part(subject, starts)
        return starts

    return match


def _any_of(parts: list[_Matcher]) -> _Matcher:
    def match(subject: _Subject, starts: int) -> int:
        ends = 0
        for part in parts:
            subject.effort.spend(1)
            ends |= part(subject, starts)
        return ends

    return match


def _repeat(part: _Matcher, least: int, most: int | None) -> _Matcher:
    def match(subject: _Subject, starts: int) -> int:
        for _ in range(least):
            subject.effort.spend(1)
            ends = part(subject, starts)
            if ends == starts:
                break
            starts = ends
        reached = new = starts
        rounds = 0
        while new and (most is None or rounds < most - least):
            subject.effort.spend(1)
            new = part(subject, new) & ~reached
            reached |= new
            rounds += 1
        return reached

    return match
