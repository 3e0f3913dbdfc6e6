"""Progress on standard error: bars on a terminal, one line for each step elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from vmprovision.cli.console import STDERR
from vmprovision.errors import printable

if TYPE_CHECKING:
    from types import TracebackType

    from vmprovision.progress import Progress


class Display(Protocol):
    """Shows progress while it is entered."""

    def __enter__(self) -> object: ...  # noqa: D105 -- the class describes it

    def __exit__(  # noqa: D105 -- likewise
        self,
        kind: type[BaseException] | None,
        raised: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def report(self, progress: Progress) -> None:
        """Show a step; called from a worker thread."""


def single_display() -> Display:
    """Return the display of the progress of one image."""
    if not STDERR.stream.isatty():
        return SingleLines()
    from vmprovision.cli.progress_bars import SingleBar

    return SingleBar()


def batch_display(total: int) -> Display:
    """Return the display of the progress of a batch of so many images."""
    if not STDERR.stream.isatty():
        return BatchLines(total)
    from vmprovision.cli.progress_bars import BatchBars

    return BatchBars(total)


class _Lines:
    def __enter__(self) -> None:
        """Start to show progress."""

    def __exit__(self, *_: object) -> None:
        """Stop showing progress."""


class SingleLines(_Lines):
    """A line for each step of one image."""

    def __init__(self) -> None:
        """Start before the first step."""
        self._last = ""

    def report(self, progress: Progress) -> None:
        """Show a step."""
        if progress.step != self._last:
            STDERR.print(f"vmprovision: {progress.step}")
        self._last = progress.step


class BatchLines(_Lines):
    """A line for each image of a batch that is finished."""

    def __init__(self, total: int) -> None:
        """Show a batch of this many images."""
        self._total = total
        self._done = 0

    def report(self, progress: Progress) -> None:
        """Show how an image ended."""
        if progress.outcome is not None:
            self._done += 1
            name = printable(str(progress.image))
            STDERR.print(f"vmprovision: {self._done} of {self._total}: {name}: {progress.outcome}")
