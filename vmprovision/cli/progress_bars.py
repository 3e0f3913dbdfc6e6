"""Progress as bars, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from vmprovision.errors import printable

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import TaskID

    from vmprovision.progress import Progress


class SingleBar:
    """A bar for the steps of one image."""

    def __init__(self, console: Console | None = None) -> None:
        """Show on this console, or on standard error."""
        self._bars = _bars(console)
        self._bar: TaskID | None = None

    def __enter__(self) -> None:
        """Start to show progress."""
        self._bars.start()
        self._bar = self._bars.add_task("starting", total=None)

    def __exit__(self, *_: object) -> None:
        """Stop showing progress."""
        self._bars.stop()

    def report(self, progress: Progress) -> None:
        """Show a step."""
        if self._bar is not None:
            _show_step(self._bars, self._bar, progress.step, progress.fraction)


class BatchBars:
    """A bar for a batch, and one for each image in work."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        """Show a batch of this many images on this console, or on standard error."""
        self._total = total
        self._done = 0
        self._bars = _bars(console)
        self._all: TaskID | None = None
        self._images: dict[Path, TaskID] = {}

    def __enter__(self) -> None:
        """Start to show progress."""
        self._bars.start()
        self._all = self._bars.add_task(self._summary(), total=self._total)

    def __exit__(self, *_: object) -> None:
        """Stop showing progress."""
        self._bars.stop()

    def report(self, progress: Progress) -> None:
        """Show a step of an image, or how it ended."""
        self._done += progress.outcome is not None
        if self._all is not None:
            self._update(self._all, progress)

    def _update(self, everything: TaskID, progress: Progress) -> None:
        self._bars.update(everything, description=self._summary(), completed=self._done)
        if progress.image is None:
            return
        if progress.outcome is not None:
            if progress.image in self._images:
                self._bars.remove_task(self._images.pop(progress.image))
            return
        name = printable(progress.image.name or str(progress.image))
        description = f"{name}: {progress.step}"
        if progress.image not in self._images:
            self._images[progress.image] = self._bars.add_task(description, total=None)
        _show_step(self._bars, self._images[progress.image], description, progress.fraction)

    def _summary(self) -> str:
        return f"{self._done} of {self._total}"


def _bars(console: Console | None) -> Bars:
    return Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=console or Console(stderr=True),
        transient=True,
    )


def _show_step(bars: Bars, bar: TaskID, description: str, fraction: float | None) -> None:
    bars.update(
        bar,
        description=description,
        total=None if fraction is None else 1.0,
        completed=fraction or 0.0,
    )
