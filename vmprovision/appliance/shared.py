"""Restored appliances that work on one image after another, for images of one owner.

Between two images nothing of the first is mounted or plugged in.  What an appliance
keeps all the same is its kernel and its daemon: a guest that took those over through
its filesystem would meet the next image.  An appliance that had to start RAID or LVM,
or in which anything failed, is not used again.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from vmprovision.appliance.session import Appliance, open_appliance
from vmprovision.appliance.snapshot.host import restore
from vmprovision.appliance.snapshot.restore import attach_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmprovision.appliance.drives import Drive
    from vmprovision.appliance.snapshot.restore import RestoredAppliance
    from vmprovision.progress import Control


class SharedAppliances:
    """As many appliances as there are threads that use them at once.

    Each ends with the thread that has started it, so close them before their threads end.
    """

    def __init__(self) -> None:
        """Have none yet."""
        self._idle: list[RestoredAppliance] = []
        self._guard = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """End those that are not in use now, and the others as soon as they are not."""
        with self._guard:
            self._closed = True
            while self._idle:
                self._idle.pop().close()

    @contextlib.contextmanager
    def open(self, drives: Sequence[Drive], *, control: Control) -> Iterator[Appliance]:
        """As ``open_appliance``, with an appliance that others have used before.

        Raises:
            ApplianceError: as there.
            CancelledError: the caller cancelled.
        """
        restored = self._take(control)
        numbers = attach_all(restored, drives) if restored else None
        if restored is None or numbers is None:
            with open_appliance(drives, control=control) as appliance:
                yield appliance
            return
        appliance = Appliance(restored)
        is_clean = False
        try:
            with appliance.blaming_the_host():
                yield appliance
                appliance.finish()
            for number in numbers:
                restored.wait_until_gone(number)
            is_clean = not appliance.has_volumes
        finally:
            with self._guard:
                if is_clean and not self._closed:
                    self._idle.append(restored)
                    restored = None
            if restored is not None:
                restored.close()

    def _take(self, control: Control) -> RestoredAppliance | None:
        with self._guard:
            if self._idle:
                restored = self._idle.pop()
                restored.watchdog.serve(control)
                return restored
        return restore(control)
