"""An appliance that is restored before it is known what for."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vmprovision.appliance.session import Appliance, open_appliance, use
from vmprovision.appliance.snapshot.host import restore
from vmprovision.appliance.snapshot.restore import attach_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmprovision.appliance.drives import Drive
    from vmprovision.progress import Control


class ApplianceAhead:
    """An appliance that is ready when the image is; it serves one image.

    It ends with the thread that started it. A second image, or a host without a saved
    appliance, gets one as from ``open_appliance``.
    """

    def __init__(self, control: Control) -> None:
        """Restore it, if this host has saved one.

        Raises:
            ApplianceError: libguestfs or its QEMU is not installed.
            CancelledError: the caller cancelled.
        """
        self._ready = restore(control, build=False)

    def close(self) -> None:
        """End it, if it was not used."""
        if self._ready is not None:
            self._ready.close()

    @contextlib.contextmanager
    def open(self, drives: Sequence[Drive], *, control: Control) -> Iterator[Appliance]:
        """Give it, as ``open_appliance`` does.

        Raises:
            ApplianceError: as there.
            CancelledError: the caller cancelled.
        """
        ready, self._ready = self._ready, None
        if ready is not None and attach_all(ready, drives) is not None:
            opened = use(ready)
        else:
            opened = open_appliance(drives, control=control)
        with opened as appliance:
            yield appliance
