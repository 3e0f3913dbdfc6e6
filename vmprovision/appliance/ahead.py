"""An appliance that is restored before it is known what for."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vmprovision.appliance.session import Appliance, use_or_open
from vmprovision.appliance.snapshot.host import restore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmprovision.appliance.drives import Drive
    from vmprovision.progress import Control


class ApplianceAhead:
    """An appliance that is ready when the image is; it serves one image.

    It ends with the thread that started it. A second image, or a host without a saved
    appliance, gets one as ``open_appliance`` gives it.
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
        with use_or_open(ready, drives, control=control) as appliance:
            yield appliance
