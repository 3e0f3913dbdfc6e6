"""Restored appliances that work on one image after another, for images of one owner.

Between two images nothing of the first is mounted or attached. But the appliance keeps its
kernel and its daemon: a guest that took those over through its filesystem would meet the
next image. An appliance that started RAID or LVM, or in which anything failed, is not used
again.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from vmprovision.appliance.session import Appliance, blaming_the_host, open_appliance
from vmprovision.appliance.snapshot.host import restore
from vmprovision.appliance.snapshot.restore import attach_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmprovision.appliance.drives import Drive
    from vmprovision.appliance.snapshot.restore import RestoredAppliance
    from vmprovision.progress import Control

DISKS_LIMIT = 100  # the kernel keeps some of each in memory; QEMU's bus has 256 numbers


class SharedAppliances:
    """As many appliances as threads use them at once.

    Each ends with the thread that started it, so close them before their threads end.
    After ``DISKS_LIMIT`` disks another takes its place, so that a batch of any length needs
    the same memory.
    """

    def __init__(self) -> None:
        """Start with no appliance."""
        self._idle: list[RestoredAppliance] = []
        self._guard = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """End the idle appliances now, and the others as soon as they are idle."""
        with self._guard:
            self._closed = True
            while self._idle:
                self._idle.pop().close()

    @contextlib.contextmanager
    def open(self, drives: Sequence[Drive], *, control: Control) -> Iterator[Appliance]:
        """Give an appliance that others may have used, as ``open_appliance`` does.

        Raises:
            ApplianceError: as there.
            CancelledError: the caller cancelled.
        """
        restored = self._take(control)
        if restored is None or attach_all(restored, drives) is None:
            with open_appliance(drives, control=control) as appliance:
                yield appliance
            return
        is_reusable = False
        try:
            with blaming_the_host(restored):
                yield restored
                restored.detach()
            is_reusable = not restored.has_volumes and restored.attached < DISKS_LIMIT
        finally:
            if not self._keep(restored, is_reusable=is_reusable):
                restored.close()

    def _take(self, control: Control) -> RestoredAppliance | None:
        with self._guard:
            if self._idle:
                restored = self._idle.pop()
                restored.serve(control)
                return restored
        return restore(control)

    def _keep(self, restored: RestoredAppliance, *, is_reusable: bool) -> bool:
        """Return whether an appliance is kept for another image."""
        with self._guard:
            if is_reusable and not self._closed:
                self._idle.append(restored)
                return True
        return False
