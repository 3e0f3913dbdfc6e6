"""The threads that do the work: each leases a row, does one step, and commits the result."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete

from vmprovision.errors import (
    ApplianceError,
    CancelledError,
    CommandError,
    FleetError,
    HypervisorError,
    ImageLockedError,
    ImageSpaceError,
    VmprovisionError,
    unexpected_error,
)
from vmprovision.server.actions.templates import release_hidden_template
from vmprovision.server.hypervisor import HypervisorUnreachableError
from vmprovision.server.injecting import FleetUnreachableError
from vmprovision.server.leases import (
    Lease,
    LostLeaseError,
    claim_building_vm,
    claim_template,
    claim_watched_vm,
    finish,
    forget,
    renew,
)
from vmprovision.server.phases import state_word
from vmprovision.server.preparing import prepare, remove_template
from vmprovision.server.problems import describe
from vmprovision.server.rows import TemplateRow
from vmprovision.server.steps import do_step, give_up
from vmprovision.server.store import DatabaseError
from vmprovision.server.tables import events, replies, samples, templates, vms
from vmprovision.server.tools import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmprovision.server.rows import VmRow
    from vmprovision.server.tools import Tools

log = logging.getLogger(__name__)

# Causes that may be temporary; all others are final.
TRANSIENT = (
    ApplianceError,
    CommandError,
    FleetError,
    HypervisorError,
    ImageLockedError,
    ImageSpaceError,
)
ATTEMPTS = 5
RETRY_SECONDS = 2.0
IDLE_SECONDS = 0.5  # another server may have written a row
WATCHERS = 2
KEPT_SECONDS = 86400.0
TIDY_SECONDS = 60.0


class Workers:
    """The threads of one server."""

    def __init__(self, tools: Tools) -> None:
        """Prepare the threads; ``start`` starts them."""
        self._tools = tools
        self._owner = f"{socket.gethostname()[:30]}:{os.getpid()}:{secrets.token_hex(4)}"
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._held: dict[str, Lease] = {}
        store, seconds = tools.store, tools.settings.lease_seconds
        lanes: list[Callable[[str], VmRow | TemplateRow | None]] = [
            lambda owner: claim_template(store, owner, seconds),
            *[lambda owner: claim_building_vm(store, owner, seconds)] * tools.settings.builders,
            *[lambda owner: claim_watched_vm(store, owner, seconds)] * WATCHERS,
        ]
        self._threads = [
            threading.Thread(target=self._work, args=(claim, f"{self._owner}:{number}"))
            for number, claim in enumerate(lanes)
        ]
        self._threads += [threading.Thread(target=self._renew), threading.Thread(target=self._tidy)]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Let the threads look for work now."""
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """Stop the threads, after steps that cannot be cancelled."""
        self._closed.set()
        self._tools.control.cancelled.set()
        self.wake()
        for thread in self._threads:
            thread.join()

    def _work(self, claim: Callable[[str], VmRow | TemplateRow | None], owner: str) -> None:
        while not self._closed.is_set():
            try:
                row = claim(owner)
                if row is not None:
                    self._do(row, owner)
                    continue
            except Exception as exc:  # noqa: BLE001 -- whatever the database's driver raises
                # it may be unavailable for a while; nothing is lost, and the thread continues
                log.warning("the work is interrupted: %s", exc)
                self._closed.wait(RETRY_SECONDS)
            with self._changed:
                self._changed.wait(IDLE_SECONDS)

    def _do(self, row: VmRow | TemplateRow, owner: str) -> None:
        """Do one step, and commit it if this server still holds the lease."""
        table = templates if isinstance(row, TemplateRow) else vms
        lease = Lease(table=table, row_id=row.id, owner=owner)
        self._held[owner] = lease
        try:
            outcome = self._outcome(row)
            with contextlib.suppress(LostLeaseError):
                self._commit(row, lease, outcome)
        finally:
            self._held.pop(owner, None)
        if outcome.due_in <= 0:
            self.wake()

    def _outcome(self, row: VmRow | TemplateRow) -> Outcome:
        try:
            if not isinstance(row, TemplateRow):
                return do_step(self._tools, row)
            step = remove_template if row.state == "deleting" else prepare
            return step(self._tools, row)
        except CancelledError:
            return Outcome()  # the server stops; the next one continues
        except DatabaseError:
            raise  # no fault of the row, which stays as it is
        except VmprovisionError as exc:
            return self._after_error(row, exc)
        except Exception as exc:
            log.exception("%s: unexpected", row.id)
            return self._after_error(row, unexpected_error(exc))

    def _after_error(self, row: VmRow | TemplateRow, error: VmprovisionError) -> Outcome:
        """Return what becomes of a row whose step failed; nothing half-made remains of it."""
        outcome = _after_error(row, error)
        if outcome.kind != "failed":
            return outcome
        with contextlib.suppress(OSError):  # a delete tries it again
            if isinstance(row, TemplateRow):
                remove_template(self._tools, row)
            else:
                changes = {**outcome.changes, **give_up(self._tools, row)}
                return replace(outcome, changes=changes)
        return outcome

    def _commit(self, row: VmRow | TemplateRow, lease: Lease, outcome: Outcome) -> None:
        store = self._tools.store
        if outcome.is_gone:
            forget(store, lease, outcome.kind, outcome.message)
            if not isinstance(row, TemplateRow):
                with store.write() as connection:
                    release_hidden_template(connection, row.template_id)
                    connection.execute(delete(samples).where(samples.c.vm_id == row.id))
            return
        finish(
            store,
            lease,
            outcome.changes,
            due_at=time.time() + outcome.due_in,
            kind=outcome.kind if not isinstance(row, TemplateRow) else "",
            message=outcome.message,
        )

    def _renew(self) -> None:
        """Renew the held leases, so that no other server takes a long step over."""
        seconds = self._tools.settings.lease_seconds
        while not self._closed.wait(seconds / 3):
            for lease in list(self._held.values()):
                try:
                    renew(self._tools.store, lease, seconds)
                except Exception as exc:  # noqa: BLE001, PERF203 -- likewise
                    log.warning("a lease was not renewed: %s", exc)

    def _tidy(self) -> None:
        """Delete data older than a day."""
        while True:
            with contextlib.suppress(Exception):
                self._forget_old(time.time() - KEPT_SECONDS)
            if self._closed.wait(TIDY_SECONDS):
                return

    def _forget_old(self, before: float) -> None:
        with self._tools.store.write() as connection:
            connection.execute(delete(samples).where(samples.c.at < before))
            connection.execute(delete(replies).where(replies.c.created_at < before))
            connection.execute(delete(events).where(events.c.at < before))


def _after_error(row: VmRow | TemplateRow, error: VmprovisionError) -> Outcome:
    """Return the outcome for a failed step: it is tried again, or it has failed for good."""
    document = describe(error)
    wants_deletion = (
        row.state == "deleting" if isinstance(row, TemplateRow) else row.wanted == "deleted"
    )
    is_unreachable = isinstance(error, (FleetUnreachableError, HypervisorUnreachableError))
    is_last = not isinstance(error, TRANSIENT) or row.attempts + 1 >= ATTEMPTS
    changes: dict[str, Any] = {"error": document}
    if is_unreachable or wants_deletion or not is_last:
        attempts = row.attempts + (0 if is_unreachable else 1)
        pause = RETRY_SECONDS if is_unreachable else RETRY_SECONDS * 2 ** min(row.attempts, 4)
        is_news = (row.error or {}).get("detail") != document["detail"]
        return Outcome(
            changes={**changes, "attempts": attempts},
            due_in=pause,
            kind="trouble" if is_news else "",
            message=error.message,
        )
    changes |= {"state": "failed"} if isinstance(row, TemplateRow) else {"has_failed": True}
    word = "a template" if isinstance(row, TemplateRow) else f"a VM that is {state_word(row)}"
    log.warning("%s, %s, failed: %s", row.id, word, error)
    return Outcome(changes=changes, due_in=1e9, kind="failed", message=error.message)
