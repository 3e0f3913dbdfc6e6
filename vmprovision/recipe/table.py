"""Read a TOML table key by key, and check each value.

A wrong value raises ``RecipeError``, which names the file and the key.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from vmprovision.errors import RecipeError

if TYPE_CHECKING:
    import re
    from collections.abc import Mapping
    from pathlib import Path


class Table:
    """A TOML table; each known key is removed when it is read, so that unknown keys remain."""

    def __init__(self, path: Path, content: Mapping[str, Any], prefix: str) -> None:
        """Keep the table's keys; the prefix is its own name in the file, with a dot."""
        self._path = path
        self._left = dict(content)
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        """Return whether a key is there and was not read yet."""
        return key in self._left

    def wrong(self, key: str, why: str) -> RecipeError:
        """Return the error for one key."""
        return RecipeError(f"{self._path}: {self._prefix}{key} {why}")

    def text(self, key: str, *, default: str | None = None) -> str:
        """Return a text; an empty one only if there is a default."""
        value = self._left.pop(key, default)
        if value is None:
            raise self.wrong(key, "is missing")
        if not isinstance(value, str) or (not value.strip() and default is None):
            raise self.wrong(key, "must be a text")
        return value

    def matching(self, key: str, pattern: re.Pattern[str]) -> str:
        """Return a text that matches the whole pattern."""
        value = self.text(key)
        if not pattern.fullmatch(value):
            raise self.wrong(key, f"cannot be {value!r}")
        return value

    def optional(self, key: str, pattern: re.Pattern[str]) -> str:
        """Return a text that is missing, empty or matches the whole pattern."""
        value = self.text(key, default="")
        if value and not pattern.fullmatch(value):
            raise self.wrong(key, f"cannot be {value!r}")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """Return one of these texts."""
        value = self.text(key)
        if value not in choices:
            raise self.wrong(key, f"is {value!r} and must be one of {', '.join(choices)}")
        return value

    def uuid(self, key: str) -> str:
        """Return a UUID in its usual form."""
        value = self.text(key)
        try:
            return str(uuid.UUID(value))
        except ValueError:
            raise self.wrong(key, f"is {value!r}, which is not a UUID") from None

    def texts(self, key: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
        """Return a list of texts that match the whole pattern; empty if it is missing."""
        values = self._left.pop(key, [])
        if not isinstance(values, list):
            raise self.wrong(key, "must be a list of texts")
        for value in values:
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise self.wrong(key, f"cannot hold {value!r}")
        return tuple(values)

    def number(self, key: str, least: int, most: int, *, default: int | None = None) -> int:
        """Return a whole number within these limits; a missing one only if there is a default."""
        value = self._left.pop(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"must be a whole number from {least} to {most}")
        return value

    def truth(self, key: str, *, default: bool) -> bool:
        """Return true or false."""
        value = self._left.pop(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """Return an inner table."""
        value = self._left.pop(key, None)
        if not isinstance(value, dict):
            raise self.wrong(key, "must be a table")
        return value

    def refuse_unknown(self) -> None:
        """Raise an error for the first key that was not read."""
        for key in sorted(self._left):
            raise self.wrong(key, "is not a key of a recipe")
