"""An appliance that is restored while its caller still prepares the one image for it."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING

from vmprovision.appliance.session import Appliance, open_appliance, use
from vmprovision.appliance.snapshot.host import find_host_appliance, restore
from vmprovision.appliance.snapshot.restore import attach_all
from vmprovision.errors import ApplianceError, CancelledError
from vmprovision.progress import Control

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from vmprovision.appliance.drives import Drive
    from vmprovision.appliance.snapshot.restore import RestoredAppliance

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.1


class RestoredAhead:
    """A ``pool`` for one image, which starts to restore an appliance at once.

    A command uses it while it imports its modules and checks the image. If this host has
    no saved appliance yet, ``open`` builds it, because the caller sees the progress there.

    Use it as a context manager: leaving it ends an appliance that nobody has taken.
    """

    def __init__(self) -> None:
        """Start to restore, in a thread."""
        self._restored: RestoredAppliance | None = None
        self._control = Control()
        self._finished = threading.Event()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._restore, name="vmprovision-ahead", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End what was restored, unless it was taken; nothing remains."""
        self._control.cancelled.set()
        self._left.set()
        self._thread.join()

    @contextlib.contextmanager
    def open(self, drives: Sequence[Drive], *, control: Control) -> Iterator[Appliance]:
        """Give the appliance to its first caller; otherwise do what ``open_appliance`` does.

        Raises:
            ApplianceError: as there.
            CancelledError: as there.
        """
        restored = self._take(control)
        if restored is not None and attach_all(restored, drives) is not None:
            opened = use(restored)
        else:
            opened = open_appliance(drives, control=control)
        with opened as appliance:
            yield appliance

    def _take(self, control: Control) -> RestoredAppliance | None:
        while not self._finished.wait(WAIT_SECONDS):
            if control.cancelled.is_set():
                return None
        restored, self._restored = self._restored, None
        if restored is not None:
            restored.serve(control)
        return restored

    def _restore(self) -> None:
        """Restore an appliance, and wait: it ends with the thread that started it."""
        try:
            if find_host_appliance() is not None:
                self._restored = restore(self._control)
        except (ApplianceError, CancelledError) as exc:
            log.debug("no appliance was restored ahead: %s", exc.message)
        finally:
            self._finished.set()
        self._left.wait()
        if self._restored is not None:
            self._restored.close()
