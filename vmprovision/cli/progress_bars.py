"""Progress on standard error: bars on a terminal, one line for each step elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from vmprovision.errors import printable

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from rich.console import Console
    from rich.progress import TaskID

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


class SingleDisplay:
    """The progress of one image: a bar, or a line for each step."""

    def __init__(self, console: Console) -> None:
        """Show on this console."""
        self._console = console
        self._bars = _bars(console)
        self._bar: TaskID | None = None
        self._last = ""

    def __enter__(self) -> None:
        """Start to show progress."""
        if self._console.is_terminal:
            self._bars.start()
            self._bar = self._bars.add_task("starting", total=None)

    def __exit__(self, *_: object) -> None:
        """Stop showing progress."""
        if self._bar is not None:  # else it would print an empty line
            self._bars.stop()

    def report(self, progress: Progress) -> None:
        """Show a step."""
        if self._bar is not None:
            _show_step(self._bars, self._bar, progress.step, progress.fraction)
        elif progress.step != self._last:
            self._console.print(f"vmprovision: {progress.step}")
        self._last = progress.step


class BatchDisplay:
    """The progress of a batch: a bar for all and one for each image in work, or a line for each."""

    def __init__(self, console: Console, total: int) -> None:
        """Show a batch of this many images on this console."""
        self._console = console
        self._total = total
        self._done = 0
        self._bars = _bars(console)
        self._all: TaskID | None = None
        self._images: dict[Path, TaskID] = {}

    def __enter__(self) -> None:
        """Start to show progress."""
        if self._console.is_terminal:
            self._bars.start()
            self._all = self._bars.add_task(self._summary(), total=self._total)

    def __exit__(self, *_: object) -> None:
        """Stop showing progress."""
        if self._all is not None:
            self._bars.stop()

    def report(self, progress: Progress) -> None:
        """Show a step of an image, or how it ended."""
        self._done += progress.outcome is not None
        if self._all is not None:
            self._update(self._all, progress)
        elif progress.outcome is not None:
            name = printable(str(progress.image))
            self._console.print(f"vmprovision: {self._summary()}: {name}: {progress.outcome}")

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


def _bars(console: Console) -> Bars:
    return Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _show_step(bars: Bars, bar: TaskID, description: str, fraction: float | None) -> None:
    bars.update(
        bar,
        description=description,
        total=None if fraction is None else 1.0,
        completed=fraction or 0.0,
    )
