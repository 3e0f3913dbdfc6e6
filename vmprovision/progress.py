"""Report the progress of long work to its caller, and let the caller cancel it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmprovision.errors import CancelledError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A step of the work that has begun, or progressed.

    Attributes:
        step: what is being done, in a few words: "starting the appliance".
        fraction: how much of this step is done, 0 to 1; None if unknown.
        image: the image that it concerns, if the work is on several.
        outcome: how that image ended; given once, with its last step.
    """

    step: str
    fraction: float | None = None
    image: Path | None = None
    outcome: str | None = None


ProgressCallback = Callable[[Progress], None]


def no_progress(_: Progress) -> None:
    """Ignore progress."""


@dataclass(slots=True, kw_only=True)
class Control:
    """A caller's control of running work: it receives progress and can cancel.

    Attributes:
        report: called in the working thread at every step.
        cancelled: set it, from any thread, to stop the work; the image stays unchanged.
    """

    report: ProgressCallback = no_progress
    cancelled: threading.Event = field(default_factory=threading.Event)

    def step(self, step: str, fraction: float | None = None) -> None:
        """Report a step, unless the caller has cancelled.

        Raises:
            CancelledError: ``cancelled`` is set.
        """
        if self.cancelled.is_set():
            raise CancelledError("cancelled", hint="nothing was changed")
        self.report(Progress(step=step, fraction=fraction))
