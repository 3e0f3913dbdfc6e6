"""The saved appliance that this host uses: on KVM if that works for it, else on TCG."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from vmprovision.appliance.handle import SessionFolderError
from vmprovision.appliance.library import qemu_program
from vmprovision.appliance.snapshot.ingredients import UnusableApplianceError
from vmprovision.appliance.snapshot.restore import RestoredAppliance
from vmprovision.appliance.snapshot.store import find_saved, saved_appliance, suspect
from vmprovision.errors import ApplianceError
from vmprovision.qemu.accelerator import choose_accelerator, run_accelerated

if TYPE_CHECKING:
    from vmprovision.appliance.snapshot.store import SavedAppliance
    from vmprovision.progress import Control
    from vmprovision.qemu.options import Accelerator

log = logging.getLogger(__name__)

STOCK_VARIABLE = "VMPROVISION_STOCK_APPLIANCE"


def host_appliance(control: Control) -> SavedAppliance | None:
    """Return this host's saved appliance, built if there is none; None if there can be none.

    Raises:
        ApplianceError: libguestfs or its QEMU is not installed.
        CancelledError: the caller cancelled.
    """
    if os.environ.get(STOCK_VARIABLE):
        return None
    qemu = qemu_program()
    try:
        return run_accelerated(
            qemu,
            lambda accelerator: saved_appliance(qemu, accelerator, control),
            failure_of=_machine_failure,
        )
    except UnusableApplianceError as exc:
        log.info("using a stock appliance: %s", exc.message)
        return None


def build_host_appliance(control: Control) -> SavedAppliance:
    """Build this host's saved appliance, whether there is one or not.

    Raises:
        UnusableApplianceError: there can be none here; the message says why.
        ApplianceError: libguestfs or its QEMU is not installed.
        CancelledError: the caller cancelled.
    """
    qemu = qemu_program()
    return run_accelerated(
        qemu,
        lambda accelerator: saved_appliance(qemu, accelerator, control, refresh=True),
        failure_of=_machine_failure,
    )


def find_host_appliance() -> SavedAppliance | None:
    """Return the saved appliance that would be restored now; None if it is yet to be built.

    Raises:
        UnusableApplianceError: there can be none here; the message says why.
        ApplianceError: libguestfs or its QEMU is not installed.
    """
    qemu = qemu_program()
    accelerator = choose_accelerator(qemu).accelerator
    try:
        return find_saved(qemu, accelerator)
    except UnusableApplianceError:
        if accelerator == "tcg":
            raise
        return find_saved(qemu, "tcg")


def restore(control: Control, *, build: bool = True) -> RestoredAppliance | None:
    """Restore this host's saved appliance, without a disk; return None if there is none.

    If it does not restore on KVM, the one for TCG is restored at once.

    Args:
        control: progress and cancellation.
        build: save one if there is none yet.

    Raises:
        ApplianceError: libguestfs or its QEMU is not installed.
        CancelledError: the caller cancelled.
    """
    if os.environ.get(STOCK_VARIABLE):
        return None
    qemu = qemu_program()

    def attempt(accelerator: Accelerator) -> RestoredAppliance:
        saved = (
            saved_appliance(qemu, accelerator, control) if build else find_saved(qemu, accelerator)
        )
        if saved is None:
            raise UnusableApplianceError("none is saved yet")
        return _restored(saved, control)

    try:
        return run_accelerated(qemu, attempt, failure_of=_machine_failure)
    except (UnusableApplianceError, SessionFolderError) as exc:
        log.info("using a stock appliance: %s", exc.message)
    except ApplianceError as exc:
        log.warning("the saved appliance failed, starting a stock one: %s", exc.message)
    return None


def _restored(saved: SavedAppliance, control: Control) -> RestoredAppliance:
    try:
        return RestoredAppliance(saved, control)
    except SessionFolderError:
        raise
    except ApplianceError:
        suspect(saved)
        raise


def _machine_failure(exc: ApplianceError) -> ApplianceError | None:
    """Return the failure that another accelerator may avoid; None if there is none in an error."""
    if isinstance(exc, UnusableApplianceError):
        return exc.machine
    return None if isinstance(exc, SessionFolderError) else exc
