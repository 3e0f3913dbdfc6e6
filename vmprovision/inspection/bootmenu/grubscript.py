"""Parse GRUB's script language to a tree of statements (GNU GRUB manual, "Shell-like scripting").

The parser makes one pass over the text, with limits for words and depth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmprovision.inspection.bootmenu.files import NotUnderstoodError

if TYPE_CHECKING:
    from collections.abc import Iterator

WORDS_LIMIT = 100_000
DEPTH_LIMIT = 20

_BLANKS = re.compile(r"[ \t\r]+")
_PLAIN = re.compile(r"[^{};$ \t\r\n'\"\\]+")
_IN_DOUBLE = re.compile(r"[^\"$\\]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+|[?@#*]")
_SEPARATORS = (";", "\n")


@dataclass(frozen=True, slots=True)
class Variable:
    """``$name`` or ``${name}`` in a word."""

    name: str


Word = tuple[str | Variable, ...]


@dataclass(frozen=True, slots=True)
class Operator:
    """``;``, the end of a line, or a brace."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command with its words, and the block after it, if any."""

    words: tuple[Word, ...]
    block: tuple[Statement, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """``if``: conditions with their bodies in order, and the body of ``else``."""

    branches: tuple[tuple[tuple[Statement, ...], tuple[Statement, ...]], ...]
    otherwise: tuple[Statement, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """``for`` with its variable and words; ``while`` and ``until`` have none."""

    variable: str | None
    words: tuple[Word, ...]
    body: tuple[Statement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """``function NAME { … }``."""

    name: str
    body: tuple[Statement, ...]


Statement = Command | Choice | Loop | Function


def parse_script(text: str) -> tuple[Statement, ...]:
    """Return the statements of a script.

    Raises:
        NotUnderstoodError: the script is nested too deeply or has too many words.
    """
    parser = _Parser(tokens=list(_tokens(text)))
    found: list[Statement] = []
    while parser.peek() is not None:
        found += parser.statements(())
        parser.next()  # a brace or keyword with nothing to close
    return tuple(found)


def literal(word: Word) -> str | None:
    """Return the text of a word without variables, or None if it has any."""
    if len(word) == 1 and isinstance(word[0], str):
        return word[0]
    return None if any(isinstance(part, Variable) for part in word) else "".join(map(str, word))


def _tokens(text: str) -> Iterator[Word | Operator]:
    at = count = 0
    while at < len(text):
        if blanks := _BLANKS.match(text, at):
            at = blanks.end()
        elif text[at] in "\n;{}":
            yield Operator(text[at])
            at += 1
        elif text[at] == "#":
            end = text.find("\n", at)
            at = end if end >= 0 else len(text)
        elif text.startswith("\\\n", at):
            at += 2
        else:
            word, at = _word(text, at)
            yield word
        count += 1
        if count > WORDS_LIMIT:
            raise NotUnderstoodError(f"the script has more than {WORDS_LIMIT} words")


def _word(text: str, at: int) -> tuple[Word, int]:
    """Return the word that begins here, and the offset after it."""
    parts: list[str | Variable] = [""]  # a quoted word may be empty
    while at < len(text) and text[at] not in "\n;{} \t\r":
        char = text[at]
        if plain := _PLAIN.match(text, at):
            parts.append(plain[0])
            at = plain.end()
        elif char == "'":
            end = text.find("'", at + 1)
            end = end if end >= 0 else len(text)
            parts.append(text[at + 1 : end])
            at = end + 1
        elif char == '"':
            at = _quoted(text, at + 1, parts)
        elif char == "\\":
            parts.append("" if text[at + 1 : at + 2] == "\n" else text[at + 1 : at + 2])
            at += 2
        else:
            part, at = _variable(text, at)
            parts.append(part)
    return _joined(parts), at


def _quoted(text: str, at: int, parts: list[str | Variable]) -> int:
    """Append the text in double quotes; return the offset after the closing quote."""
    while at < len(text) and text[at] != '"':
        if plain := _IN_DOUBLE.match(text, at):
            parts.append(plain[0])
            at = plain.end()
        elif text[at] == "\\":
            following = text[at + 1 : at + 2]
            parts.append(
                "" if following == "\n" else following if following in '"$\\' else f"\\{following}"
            )
            at += 2
        else:
            part, at = _variable(text, at)
            parts.append(part)
    return at + 1


def _variable(text: str, at: int) -> tuple[str | Variable, int]:
    brace = text.startswith("${", at)
    name = _NAME.match(text, at + 1 + brace)
    if name is None:
        return "$", at + 1
    return Variable(name[0]), name.end() + (brace and text[name.end() : name.end() + 1] == "}")


def _joined(parts: list[str | Variable]) -> Word:
    """Return the parts with neighbouring texts joined."""
    word: list[str | Variable] = []
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if text := "".join(texts):
            word.append(text)
        texts = []
        word.append(part)
    if (text := "".join(texts)) or not word:
        word.append(text)
    return tuple(word)


@dataclass(slots=True)
class _Parser:
    tokens: list[Word | Operator]
    at: int = 0
    depth: int = field(default=0)

    def peek(self) -> str | None:
        """Return the next operator or literal word, or None at the end."""
        if self.at >= len(self.tokens):
            return None
        token = self.tokens[self.at]
        return token.text if isinstance(token, Operator) else literal(token) or ""

    def next(self) -> None:
        """Return the next token and move past it."""
        self.at += 1

    def statements(self, ends: tuple[str, ...]) -> tuple[Statement, ...]:
        """Return the statements up to one of these words or a closing brace."""
        self.depth += 1
        if self.depth > DEPTH_LIMIT:
            raise NotUnderstoodError(f"the script is nested more than {DEPTH_LIMIT} deep")
        found: list[Statement] = []
        while (here := self.peek()) is not None and here != "}" and here not in ends:
            if here in _SEPARATORS:
                self.next()
            elif here == "{":
                found += self._block()
            else:
                found.append(self._statement(here))
        self.depth -= 1
        return tuple(found)

    def _statement(self, here: str) -> Statement:
        if here == "if":
            return self._choice()
        if here in ("for", "while", "until"):
            return self._loop(here)
        if here == "function":
            self.next()
            words = self._words()
            name = (literal(words[0]) or "") if words else ""
            return Function(name=name, body=self._block())
        words = self._words()
        return Command(words=words, block=self._block() if self.peek() == "{" else None)

    def _words(self) -> tuple[Word, ...]:
        """Return the words up to a separator or brace."""
        words: list[Word] = []
        while self.at < len(self.tokens):
            token = self.tokens[self.at]
            if isinstance(token, Operator):
                break
            words.append(token)
            self.next()
        return tuple(words)

    def _block(self) -> tuple[Statement, ...]:
        """Return the statements between braces."""
        while self.peek() == "\n":
            self.next()
        if self.peek() != "{":
            return ()
        self.next()
        found = self.statements(())
        self.next()
        return found

    def _choice(self) -> Choice:
        branches = []
        otherwise: tuple[Statement, ...] = ()
        while self.peek() in ("if", "elif"):
            self.next()
            condition = self.statements(("then", "fi"))
            if self.peek() == "then":
                self.next()
            branches.append((condition, self.statements(("elif", "else", "fi"))))
        if self.peek() == "else":
            self.next()
            otherwise = self.statements(("fi",))
        if self.peek() == "fi":
            self.next()
        return Choice(branches=tuple(branches), otherwise=otherwise)

    def _loop(self, kind: str) -> Loop:
        self.next()
        words: tuple[Word, ...] = ()
        condition: tuple[Statement, ...] = ()
        if kind == "for":
            words = self._words()
            while self.peek() in _SEPARATORS:
                self.next()
        else:
            condition = self.statements(("do", "done"))
        if self.peek() == "do":
            self.next()
        body = self.statements(("done",))
        if self.peek() == "done":
            self.next()
        variable = (literal(words[0]) or "") if words else None
        return Loop(variable=variable, words=words[2:], body=(*condition, *body))
