"""Restored appliances that wait ready, each for one image.

A caller pays for attaching its disk and no more. A thread restores others in place of the
appliances that were taken.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING

from vmprovision.appliance.rehearsal import rehearse
from vmprovision.appliance.session import Appliance, use_or_open
from vmprovision.appliance.snapshot.host import restore
from vmprovision.errors import ApplianceError, CancelledError, PlanError, VmprovisionError
from vmprovision.progress import Control

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from vmprovision.appliance.drives import Drive
    from vmprovision.appliance.snapshot.restore import RestoredAppliance

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.1
RETRY_SECONDS = 5.0  # after a restore that failed
IDLE_SECONDS = 1.0  # without a call, before appliances rehearse


class Pool:
    """Appliances that wait ready for ``inject`` and its siblings, as their ``pool``.

    At most ``size`` calls work at once, and others wait for their turn. As many
    appliances wait ready beside them. Each has about 150 MB resident, of which it shares
    about half with the others. New ones are restored while no call works, or while one
    waits. If no call comes for a second, those that wait without KVM rehearse on a scratch
    disk, one after another: that takes half a second of a processor each, and a third of the
    time of the call that gets it. Threads may share a pool, and a coroutine uses it through
    ``asyncio.to_thread``. No image meets an appliance that has worked on another image.
    If this host cannot restore appliances, each call starts its own, as without a pool.

    Use it as a context manager, or ``close`` it: that ends the waiting appliances and
    waits for the calls that work.
    """

    def __init__(self, size: int) -> None:
        """Start to restore appliances.

        Raises:
            PlanError: the size is below 1.
        """
        if size < 1:
            raise PlanError(
                f"the size of a pool must be at least 1, not {size}", hint="give 1 or more"
            )
        self._size = size
        self._ready: collections.deque[RestoredAppliance] = collections.deque()
        self._turns = threading.Semaphore(size)
        self._changed = threading.Condition()
        self._closed = Control()
        self._ended = threading.Event()
        self._fails = False
        self._fresh: set[RestoredAppliance] = set()
        self._may_rehearse = True
        self._idle_since = time.monotonic()
        self._working = 0
        self._waiting = 0
        self._filler = threading.Thread(target=self._fill, name="vmprovision-pool", daemon=True)
        self._filler.start()

    def __enter__(self) -> Self:
        """Give the pool itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """End the waiting appliances and wait for the calls that work; nothing remains."""
        self._closed.cancelled.set()
        for _ in range(self._size):
            self._turns.acquire()
        self._turns.release(self._size)
        self._ended.set()
        self._filler.join()

    def wait_until_ready(self, seconds: float) -> bool:
        """Wait until all appliances are ready and have rehearsed; return whether they are in time.

        Args:
            seconds: how long to wait.
        """
        with self._changed:
            return (
                self._changed.wait_for(
                    lambda: (len(self._ready) == self._size and not self._fresh) or self._fails,
                    seconds,
                )
                and not self._fails
            )

    @contextlib.contextmanager
    def open(self, drives: Sequence[Drive], *, control: Control) -> Iterator[Appliance]:
        """Give an appliance that was ready, as ``open_appliance`` does.

        Raises:
            ApplianceError: as there; or the pool is closed.
            CancelledError: the caller cancelled, perhaps while waiting for its turn.
        """
        with self._turn(control):
            restored = self._take(control)
            with self._at_work(), use_or_open(restored, drives, control=control) as appliance:
                yield appliance

    @contextlib.contextmanager
    def _turn(self, control: Control) -> Iterator[None]:
        while not self._turns.acquire(timeout=WAIT_SECONDS):
            if control.cancelled.is_set():
                raise CancelledError("cancelled", hint="nothing was changed")
        try:
            if self._closed.cancelled.is_set():
                raise ApplianceError("the pool is closed", hint="make another one")
            yield
        finally:
            self._turns.release()

    def _take(self, control: Control) -> RestoredAppliance | None:
        """Return an appliance that obeys this caller; None if none can be restored."""
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            try:
                while not self._ready:
                    if self._fails or control.cancelled.is_set() or self._closed.cancelled.is_set():
                        return None
                    self._changed.wait(WAIT_SECONDS)
                restored = self._ready.popleft()
                self._fresh.discard(restored)
            finally:
                self._waiting -= 1
        restored.serve(control)
        return restored

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._changed:
            self._working += 1
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._idle_since = time.monotonic()
                self._changed.notify_all()

    def _fill(self) -> None:
        """Keep the pool full.

        Appliances end with the thread that started them, so this one outlives them all.
        """
        while not self._closed.cancelled.is_set():
            with self._changed:
                lacks_one = self._changed.wait_for(self._lacks_one, WAIT_SECONDS)
            if not lacks_one:
                self._rehearse_one()
                continue
            restored = self._restored()
            with self._changed:
                self._fails = restored is None
                if restored is not None:
                    self._ready.append(restored)
                    if self._may_rehearse and restored.saved.accelerator == "tcg":
                        self._fresh.add(restored)
                self._changed.notify_all()
            if restored is None:
                self._closed.cancelled.wait(RETRY_SECONDS)
        self._ended.wait()
        while self._ready:
            self._ready.popleft().close()

    def _restored(self) -> RestoredAppliance | None:
        try:
            restored = restore(self._closed)
        except ApplianceError as exc:
            log.warning("the pool cannot restore an appliance: %s", exc.message)
        except CancelledError:
            log.debug("the pool was closed before it was full")
        else:
            if restored is not None:
                restored.serve(Control())  # closing the pool lets it work on
            return restored
        return None

    def _rehearse_one(self) -> None:
        """Let an appliance rehearse if no call came for a while; it is the next to be taken."""
        with self._changed:
            is_idle = time.monotonic() - self._idle_since >= IDLE_SECONDS and self._is_idle()
            if not is_idle or not self._fresh:
                return
            restored = next(each for each in self._ready if each in self._fresh)
            self._ready.remove(restored)
        try:
            is_done = rehearse(restored, self._is_idle)
        except VmprovisionError as exc:
            log.warning("an appliance cannot rehearse: %s", exc.message)
            restored.close()
            with self._changed:
                self._may_rehearse = False
                self._fresh.clear()
            return
        with self._changed:
            self._ready.appendleft(restored)
            if is_done:
                self._fresh.remove(restored)
            self._changed.notify_all()

    def _is_idle(self) -> bool:
        """Return whether no call works or waits, and the pool is open."""
        return not (self._working or self._waiting or self._closed.cancelled.is_set())

    def _lacks_one(self) -> bool:
        """Return whether to restore another one now: no call works, or one waits for it."""
        if len(self._ready) >= self._size:
            return False
        return not self._working or (self._waiting > len(self._ready))
