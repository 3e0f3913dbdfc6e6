"""Make Python source smaller without changing its meaning, for the agent's archive.

Only the tokenizer is used: parsing in one thread disturbs parsing in another (CPython
3.11).  Condensed source has no comments, so patterns can tell strings from names.
"""

from __future__ import annotations

import builtins
import collections
import io
import itertools
import re
import string
import tokenize
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SHORT = 3  # letters; shorter names stay unchanged
# public names of a module, and names private to it or to a class
_DEFINED = re.compile(
    r"^(?:def|class) (\w+)|^([A-Z_]{4,})=|(?:\bdef |\bclass |\bself\.|^)(_(?!_)[A-Za-z]\w+)\b",
    re.MULTILINE,
)
# a whole string, which is never renamed, or a word
_TOKEN = re.compile(r'''"""(?:.|\n)*?"""|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|[A-Za-z_]\w*''')
_FOREIGN_IMPORT = re.compile(r"^ *import (\w+)", re.MULTILINE)
_STRING = re.compile(r"[\"'](\w+)[\"']")
_ATTRIBUTE = re.compile(r"(\w*)\.(\w+)")  # no owner: that of a call's or an index's result
_KEYWORD = re.compile(r"[(,](\w+)=(?!=)")  # may be an argument of another's function


def rename(sources: Mapping[str, str]) -> dict[str, str]:
    """Return condensed modules with short names for their functions, classes and constants.

    Some names stay: those of modules and builtins, those in a string (for ``getattr``),
    keywords of calls, attributes of anything but these modules, and ``main``, which the
    archive starts.
    """
    together = "\n".join(sources[name] for name in sorted(sources))
    defined = {name for found in _DEFINED.findall(together) for name in found if name[SHORT:]}
    foreign = {
        name
        for owner, name in _ATTRIBUTE.findall(together)
        if owner not in sources and not name.startswith("_")
    }
    kept = {*sources, *dir(builtins), *foreign, *_STRING.findall(together), "main"}
    kept.update(_FOREIGN_IMPORT.findall(together), _KEYWORD.findall(together))
    words = collections.Counter(re.findall(r"\w+", together))
    renamed = sorted(defined - kept, key=lambda name: (-words[name], name))
    short = dict(zip(renamed, (name for name in _short_names() if name not in words), strict=False))
    return {
        module: _TOKEN.sub(lambda found: short.get(found[0], found[0]), source)
        for module, source in sources.items()
    }


def _short_names() -> Iterator[str]:
    """Yield A, B, ... Z, AA, AB and so on."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_uppercase, repeat=length):
            yield "".join(letters)


def condense(source: str) -> str:
    """Return source that does the same without comments, docstrings and needless space."""
    lines = []
    depth = 0
    docstring = None  # the depth of one that no statement has followed yet
    statement: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.INDENT:
            depth += 1
        elif token.type == tokenize.DEDENT:
            if docstring == depth:
                lines.append(" " * depth + "pass")
            docstring = None
            depth -= 1
        elif token.type == tokenize.NEWLINE:
            if [part.type for part in statement] == [tokenize.STRING]:
                docstring = depth
            else:
                docstring = None
                lines.append(" " * depth + _join(statement))
            statement = []
        elif token.type not in _NOTHING:
            statement.append(token)
    return "".join(f"{line}\n" for line in lines)


_NOTHING = {tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER}
_WORDS = {tokenize.NAME, tokenize.NUMBER, tokenize.STRING}


def _join(statement: list[tokenize.TokenInfo]) -> str:
    """Return a statement as one line, with spaces only between words."""
    text = ""
    last = tokenize.OP
    for token in statement:
        if (token.type in _WORDS and last in _WORDS) or last == tokenize.NUMBER:
            text += " "
        text += token.string
        last = token.type
    return text
