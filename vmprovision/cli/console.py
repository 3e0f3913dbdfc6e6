"""Standard output and standard error, for lines of text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from typing import TextIO


class Console:
    """One of the two streams of the program, which may be replaced while it runs."""

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        """Take the stream's name in ``sys``."""
        self._name = name

    @property
    def stream(self) -> TextIO:
        """The stream itself."""
        stream: TextIO = getattr(sys, self._name)
        return stream

    def print(self, text: str, end: str = "\n") -> None:
        """Print a line at once."""
        print(text, end=end, file=self.stream, flush=True)


STDOUT, STDERR = Console("stdout"), Console("stderr")
