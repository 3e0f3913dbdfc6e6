"""Time limits and cancelling for calls into an appliance."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.errors import ApplianceTimeoutError, CancelledError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.progress import Control

WATCH_SECONDS = 0.1


class Watchdog:
    """Ends the appliance's QEMU when a call exceeds its limit or the caller cancels.

    libguestfs has no time limits, and a call on a handle blocks every other call on it.
    So the only way out of a stuck call is to end the process that it waits for: our child
    with the unique name on its command line.
    """

    def __init__(self, mark: str, control: Control) -> None:
        """Start to watch.

        Args:
            mark: the word behind ``-name`` of QEMU.
            control: cancels.
        """
        self._mark = mark.encode()
        self._control = control
        self._deadline = float("inf")
        self._doing = ""
        self._cause: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=mark, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def limit(self, seconds: float, doing: str) -> Iterator[None]:
        """Allow the call in this block so many seconds.

        Args:
            seconds: the limit.
            doing: what the call does, for the error if it exceeds the limit.

        Raises:
            CancelledError: the caller has cancelled.
        """
        if self._control.cancelled.is_set():
            raise CancelledError("cancelled", hint="the image is unchanged")
        self.raise_cause()
        self._doing = doing
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = float("inf")

    def raise_cause(self) -> None:
        """Raise the reason for which the watchdog ended the appliance, if it did."""
        if self._cause:
            raise self._cause

    def end(self, cause: Exception) -> None:
        """End the appliance for this reason."""
        self._cause = self._cause or cause

    def serve(self, control: Control) -> None:
        """Take cancellation from another caller from now on."""
        self._control = control

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(WATCH_SECONDS):
            if self._cause is None:
                if self._control.cancelled.is_set():
                    self._cause = CancelledError("cancelled", hint="the image is unchanged")
                elif time.monotonic() > self._deadline:
                    self._cause = ApplianceTimeoutError(
                        f"the appliance did not finish {self._doing} in time",
                        hint="the host may be overloaded, its disk full, or the image damaged",
                    )
            if self._cause is not None:
                self._end_qemu()

    def _end_qemu(self) -> None:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and self._is_ours(entry):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(entry.name), signal.SIGKILL)

    def _is_ours(self, entry: Path) -> bool:
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            # the command name may hold spaces and brackets: fields count from the last bracket
            parent = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
        return self._mark in words and parent == os.getpid()
