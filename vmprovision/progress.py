"""How long work tells its caller where it stands, and how the caller stops it."""

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
    """One step of the work has begun, or is so far done.

    Attributes:
        step: what is being done, in a few words: "starting the appliance".
        fraction: how much of this step is done, 0 to 1; None where nobody can say.
        image: which image it is about, where the work is about several.
        outcome: how that image ended, said once, with its last step.
    """

    step: str
    fraction: float | None = None
    image: Path | None = None
    outcome: str | None = None


ProgressCallback = Callable[[Progress], None]


def no_progress(_: Progress) -> None:
    """Tell nobody."""


@dataclass(slots=True, kw_only=True)
class Control:
    """What a caller holds over running work: where to report, and when to stop.

    Attributes:
        report: called in the working thread at every step.
        cancelled: set it, from any thread, to stop the work; the image stays as it was.
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
