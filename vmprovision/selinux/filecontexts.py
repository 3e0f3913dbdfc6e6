"""The SELinux label of a path by a guest's policy: selabel_file(5), as libselinux reads it.

The rules are in ``file_contexts``, ``file_contexts.homedirs`` and
``file_contexts.local``, one on each line: a regular expression for whole paths, an
optional file type, and a label or ``<<none>>``. A rule without special characters beats
one with some; among equals the last one wins. Before that, ``file_contexts.subs`` and
then ``file_contexts.subs_dist`` replace the beginning of the path; here too, the last
line wins.

This module reads no file, and does not use the host's own SELinux.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vmprovision.selinux.pathpattern import Effort, matches

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import PurePosixPath

LabelledKind = Literal["file", "directory", "symlink"]
_KINDS: dict[str, LabelledKind] = {"--": "file", "-d": "directory", "-l": "symlink"}
_OTHER_KINDS = ("-b", "-c", "-p", "-s")
NO_LABEL = "<<none>>"
# user, role, and a type with an optional level. Only the last part may have a colon, so
# there is only one way to match.
_LABEL = re.compile(r"[!-9;-~]+:[!-9;-~]+:[!-~]*[!-9;-~]")
_LABEL_LIMIT = 1024
LINE_LIMIT = 50_000  # Fedora's policy has some 7,000

# The literal text before the first special character.
_PREFIX = re.compile(r"(?:[^\\.^$?*+|\[({]|\\[^0-9A-Za-z])*")
_LAST_CHARACTER = re.compile(r"\\?.\Z", re.DOTALL)


class FileContextsError(ValueError):
    """The rules do not follow selabel_file(5)."""


@dataclass(frozen=True, slots=True)  # thousands are made, so positional arguments save time
class Rule:
    """One line of ``file_contexts``.

    Attributes:
        pattern: a regular expression for whole paths.
        prefix: the beginning of every path that the pattern matches.
        kind: the kind of files that the rule is for, or None for all.
        label: the label, or None for ``<<none>>``.
        literal: whether the pattern is a plain path.
    """

    pattern: str
    prefix: str
    kind: LabelledKind | None
    label: str | None
    literal: bool


Substitutions = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileContexts:
    """A policy's rules and substitutions, in the order in which they are tried."""

    rules: tuple[Rule, ...]
    local: Substitutions = ()
    distribution: Substitutions = ()

    def label_for(self, path: PurePosixPath, kind: LabelledKind) -> str | None:
        """Return the label for a file of this kind at a path without links; None if none applies.

        Raises:
            PatternError: a pattern that may decide is not supported.
        """
        # bytes, as PCRE sees them
        name = str(path).encode("utf-8", errors="surrogateescape").decode("latin-1")
        name = _substitute(self.distribution, _substitute(self.local, name))
        effort = Effort()
        for rule in self.rules:
            if (
                rule.kind in (None, kind)
                and name.startswith(rule.prefix)
                and ((rule.literal and name == rule.prefix) or matches(rule.pattern, name, effort))
            ):
                return rule.label
        return None


def parse_file_contexts(
    texts: Iterable[str], *, local: str = "", distribution: str = ""
) -> FileContexts:
    """Parse the rules of these files, in the order in which libselinux reads them.

    Args:
        texts: ``file_contexts``, ``.homedirs``, ``.local``, decoded as Latin-1.
        local: ``file_contexts.subs``.
        distribution: ``file_contexts.subs_dist``.

    Raises:
        FileContextsError: there are no rules or too many, or a line is malformed.
    """
    lines = _lines("\n".join(texts))
    rules = [rule for line in reversed(lines) if (rule := _parse_rule(line))]
    if not rules:
        raise FileContextsError("there are none")
    rules.sort(key=lambda rule: not rule.literal)
    return FileContexts(
        rules=tuple(rules),
        local=_parse_substitutions(local),
        distribution=_parse_substitutions(distribution),
    )


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    if len(lines) > LINE_LIMIT:
        raise FileContextsError(f"there are more than {LINE_LIMIT} lines")
    return lines


def _parse_rule(line: str) -> Rule | None:
    """Return the rule of a line, or None for comments and for file kinds that are never made."""
    fields = line.split(None, 3)[:3]
    if not fields or fields[0].startswith("#"):
        return None
    kind = fields[1] if len(fields) == 3 else ""  # noqa: PLR2004 -- the optional one is there
    label = fields[-1]
    if len(fields) < 2 or (kind and kind not in _KINDS and kind not in _OTHER_KINDS):  # noqa: PLR2004 -- likewise
        raise FileContextsError(f"not a rule: {line[:80]!r}")
    if label != NO_LABEL and (len(label) > _LABEL_LIMIT or not _LABEL.fullmatch(label)):
        raise FileContextsError(f"not a label: {label[:80]!r}")
    if kind in _OTHER_KINDS:
        return None
    prefix, literal = _literal_prefix(fields[0])
    return Rule(fields[0], prefix, _KINDS.get(kind), None if label == NO_LABEL else label, literal)


def _literal_prefix(pattern: str) -> tuple[str, bool]:
    """Return the common prefix of all paths that match, and whether it is the whole path."""
    match = _PREFIX.match(pattern)
    prefix = match[0] if match else ""
    literal = len(prefix) == len(pattern)
    if not literal and pattern[len(prefix)] in "?*{":  # the last character may be missing
        prefix = _LAST_CHARACTER.sub("", prefix)
    if "|" in pattern and _is_split(pattern):
        prefix = ""
    return (re.sub(r"\\(.)", r"\1", prefix) if "\\" in prefix else prefix), literal


def _is_split(pattern: str) -> bool:
    """Return whether there may be a ``|`` outside parentheses."""
    depth = 0
    for character in re.sub(r"\\.", "", pattern):
        depth += (character == "(") - (character == ")")
        if character == "|" and depth <= 0:
            return True
    return False


def _parse_substitutions(text: str) -> Substitutions:
    lines = [line.split() for line in _lines(text)]
    pairs = [(f[0], f[1]) for f in lines if len(f) > 1 and not f[0].startswith("#")]
    return tuple(reversed(pairs))


def _substitute(substitutions: Substitutions, path: str) -> str:
    for old, new in substitutions:
        if path == old or path.startswith(f"{old}/"):
            rest = path[len(old) :]
            return rest if new == "/" and rest else new + rest
    return path
