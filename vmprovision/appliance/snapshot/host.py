"""The saved appliance that this host uses: on KVM where that works for it, else on TCG."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from vmprovision.appliance.library import qemu_program
from vmprovision.appliance.snapshot.restore import RestoredAppliance
from vmprovision.appliance.snapshot.store import (
    UnusableApplianceError,
    find_saved,
    saved_appliance,
    suspect,
)
from vmprovision.errors import ApplianceError, ApplianceTimeoutError
from vmprovision.qemu.accelerator import choose_accelerator, distrust_kvm

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.appliance.snapshot.store import SavedAppliance
    from vmprovision.progress import Control

log = logging.getLogger(__name__)

STOCK_VARIABLE = "VMPROVISION_STOCK_APPLIANCE"


def host_appliance(control: Control) -> SavedAppliance | None:
    """This host's saved appliance, made where there is none; None where there can be none.

    Raises:
        ApplianceError: libguestfs or its QEMU is not installed.
        CancelledError: the caller cancelled.
    """
    if os.environ.get(STOCK_VARIABLE):
        return None
    qemu = qemu_program()
    try:
        return _saved_on_what_works(qemu, control)
    except UnusableApplianceError as exc:
        log.info("a stock appliance is started: %s", exc.message)
        return None


def build_host_appliance(control: Control) -> SavedAppliance:
    """This host's saved appliance, made anew.

    Raises:
        UnusableApplianceError: there can be none here; the message says why.
        ApplianceError: libguestfs or its QEMU is not installed.
        CancelledError: the caller cancelled.
    """
    return _saved_on_what_works(qemu_program(), control, refresh=True)


def find_host_appliance() -> SavedAppliance | None:
    """The saved appliance that would be restored now; None where it is yet to be made.

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


def restore(control: Control) -> RestoredAppliance | None:
    """This host's saved appliance, running without a disk; None where there is none that does.

    Where KVM passed its trial and the appliance does not come up on it all the same, the
    one without KVM is taken at once.

    Raises:
        ApplianceError: libguestfs or its QEMU is not installed.
        CancelledError: the caller cancelled.
    """
    saved = host_appliance(control)
    restored = _restored(saved, control) if saved else None
    if restored or saved is None or saved.accelerator == "tcg":
        return restored
    saved = _saved_without_kvm(control)
    return _restored(saved, control) if saved else None


def _restored(saved: SavedAppliance, control: Control) -> RestoredAppliance | None:
    try:
        return RestoredAppliance(saved, control)
    except UnusableApplianceError as exc:
        log.info("the saved appliance is not used: %s", exc.message)
    except ApplianceError as exc:
        suspect(saved)
        if saved.accelerator == "tcg":
            log.warning("the saved appliance failed, a stock one is started: %s", exc.message)
        elif isinstance(exc, ApplianceTimeoutError):
            distrust_kvm(qemu_program(), exc.message)
        else:
            log.warning("the saved appliance failed on KVM, TCG is used: %s", exc.message)
    return None


def _saved_on_what_works(qemu: Path, control: Control, *, refresh: bool = False) -> SavedAppliance:
    """The saved appliance on KVM, where that works for it too, else on TCG."""
    accelerator = choose_accelerator(qemu).accelerator
    try:
        return saved_appliance(qemu, accelerator, control, refresh=refresh)
    except UnusableApplianceError as exc:
        # what a program or the host's disk refuses is no fault of the accelerator's
        if accelerator == "tcg" or not isinstance(exc.__cause__, (ApplianceError, type(None))):
            raise
        saved = saved_appliance(qemu, "tcg", control, refresh=refresh)
        if isinstance(exc.__cause__, ApplianceTimeoutError):
            distrust_kvm(qemu, exc.message)
        return saved


def _saved_without_kvm(control: Control) -> SavedAppliance | None:
    try:
        return saved_appliance(qemu_program(), "tcg", control)
    except UnusableApplianceError as exc:
        log.info("a stock appliance is started: %s", exc.message)
        return None
