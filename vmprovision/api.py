"""The straight line: open the guest, inspect, plan, apply, verify, commit.

Every public function takes a disk image, or a directory that holds an unpacked
root filesystem.  Calls share nothing, so they may run in as many threads as the
host has memory for appliances.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.changes.operations import Plan, is_satisfied
from vmprovision.changes.verify import verify_plan, verify_receipt
from vmprovision.errors import PlanError
from vmprovision.image.recovery import Recovery, recover_image
from vmprovision.inspection import explain_init
from vmprovision.inspection.packages import list_packages
from vmprovision.inspection.watched import WatchedReader
from vmprovision.planning.injection import InjectOptions, plan_injection, plan_removal
from vmprovision.planning.restoration import notes_on_names
from vmprovision.progress import Control
from vmprovision.reports import (
    ChangeReport,
    ContentsReport,
    ImageOptions,
    PlannedOperation,
    PlanReport,
    VerifyReport,
)
from vmprovision.runtime.archive import build_archive
from vmprovision.target import Access, open_target

if TYPE_CHECKING:
    from vmprovision.appliance.session import Appliances
    from vmprovision.guest.facts import GuestInfo, InitSystem, InstalledAgent
    from vmprovision.target import Target

NO_OPTIONS = InjectOptions()
DEFAULT_IMAGE = ImageOptions()


def inspect(  # noqa: PLR0913 -- the options of one inspection
    image: Path | str,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    init: InitSystem | None = None,
    explain: bool = False,
    pool: Appliances | None = None,
    control: Control | None = None,
) -> GuestInfo:
    """Return the facts about the guest in an image; write nothing.

    Args:
        image: a disk image, or a directory with an unpacked root filesystem.
        source: how to open the image.
        init: the init system, if the caller overrides the evidence.
        explain: also find the evidence for other init systems, as ``init.hints``.
        pool: a source of ready appliances.
        control: progress and cancellation.

    Raises:
        VmprovisionError: the subclass says what is wrong; the message names the image.
    """
    access = Access(source=source, init=init, pool=pool, control=control or Control())
    with open_target(Path(image), access, write=False) as target:
        return explain_init(target.filesystem, target.guest) if explain else target.guest


def plan(
    image: Path | str,
    options: InjectOptions = NO_OPTIONS,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    pool: Appliances | None = None,
    control: Control | None = None,
) -> PlanReport:
    """Return the ordered operations that ``inject`` would make; write nothing.

    Raises:
        VmprovisionError: as ``inject``.
    """
    access = Access(source=source, init=options.init, pool=pool, control=control or Control())
    with open_target(Path(image), access, write=False) as target:
        planned = plan_injection(
            target.guest, WatchedReader(target.filesystem), build_archive(), options
        )
        operations = tuple(
            PlannedOperation(
                operation=operation, satisfied=is_satisfied(operation, target.filesystem)
            )
            for operation in planned.operations
        )
        return PlanReport(
            image=Path(image),
            guest=target.guest,
            operations=operations,
            notes=(*planned.notes, *notes_on_names(planned, target.filesystem)),
            disks=source.disks,
        )


def inject(  # noqa: PLR0913 -- the options of one injection
    image: Path | str,
    options: InjectOptions = NO_OPTIONS,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    output: Path | str | None = None,
    pool: Appliances | None = None,
    control: Control | None = None,
) -> ChangeReport:
    """Install the agent in the guest; afterwards the image is finished, or unchanged to the byte.

    A guest that needs no change is not written to.

    Args:
        image: a disk image, or a directory with an unpacked root filesystem.
        options: the caller's settings; a setting that is None stays as it is in the guest.
        source: how to open the image.
        output: keep the image and write this new one.
        pool: a source of ready appliances.
        control: progress and cancellation.

    Raises:
        ImageError: the image cannot be opened, locked, written or merged.
        ApplianceError: the appliance did not start or failed.
        InspectionError: the guest cannot be read, or its files contradict each other.
        UnsupportedGuestError: the guest's init system is not supported, or nothing in it can
            run the agent.
        BundledRuntimeError: the runtime is damaged, or the given one does not fit the guest.
        PlanError: the options do not fit the guest or each other.
        ApplyError: writing inside the guest failed.
        VerificationError: the guest differs from the plan after writing.
        CancelledError: ``control.cancelled`` was set.
    """
    new = Path(output) if output is not None else None
    archive = build_archive()
    access = Access(source=source, init=options.init, pool=pool, control=control or Control())
    with open_target(Path(image), access, write=True, output=new) as target:
        planned = plan_injection(target.guest, WatchedReader(target.filesystem), archive, options)
        return _carry_out(planned, target, access, new or Path(image), archive.version)


def remove(
    image: Path | str,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    pool: Appliances | None = None,
    control: Control | None = None,
) -> ChangeReport:
    """Remove the agent from the guest; restore content, mode and owner of replaced files.

    Set-user-ID, set-group-ID and sticky bits are not restored: a guest could forge a receipt.

    Raises:
        PlanError: the guest has no injected agent, or a file that was set aside is gone.
        VmprovisionError: otherwise as ``inject``.
    """
    access = Access(source=source, pool=pool, control=control or Control())
    with open_target(Path(image), access, write=True) as target:
        planned = plan_removal(target.guest, WatchedReader(target.filesystem))
        return _carry_out(planned, target, access, Path(image))


def _carry_out(
    planned: Plan, target: Target, access: Access, image: Path, agent_version: str | None = None
) -> ChangeReport:
    """Apply a plan, verify it and commit; return the report."""
    notes = (*planned.notes, *notes_on_names(planned, target.filesystem))
    applied = target.apply(planned)
    access.control.step("verifying")
    verify_plan(planned, target.filesystem)
    target.commit()
    return ChangeReport(
        image=image,
        guest=target.guest,
        changed=tuple(operation.path for operation in applied),
        verified=len(planned.operations),
        agent_version=agent_version,
        notes=notes,
        disks=access.source.disks,
    )


def verify(
    image: Path | str,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    pool: Appliances | None = None,
    control: Control | None = None,
) -> VerifyReport:
    """Compare the guest with the receipt that the injection left in it.

    Raises:
        PlanError: the guest has no injected agent.
        VmprovisionError: otherwise as ``inspect``.
    """
    access = Access(source=source, pool=pool, control=control or Control())
    with open_target(Path(image), access, write=False) as target:
        return _verification(Path(image), _installed_agent(target.guest), target, source)


def list_contents(
    image: Path | str,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    pool: Appliances | None = None,
    control: Control | None = None,
) -> ContentsReport:
    """Return the content of an injected guest: ``verify``'s report, the receipt and the packages.

    Raises:
        VmprovisionError: as ``verify``.
    """
    access = Access(source=source, pool=pool, control=control or Control())
    with open_target(Path(image), access, write=False) as target:
        agent = _installed_agent(target.guest)
        return ContentsReport(
            guest=target.guest,
            verification=_verification(Path(image), agent, target, source),
            receipt=agent.receipt,
            packages=list_packages(WatchedReader(target.filesystem)),
        )


def _installed_agent(guest: GuestInfo) -> InstalledAgent:
    """Return the guest's installed agent.

    Raises:
        PlanError: the guest has no injected agent.
    """
    if guest.agent is None:
        raise PlanError("the guest has no injected agent", hint="inject it first")
    return guest.agent


def _verification(
    image: Path, agent: InstalledAgent, target: Target, source: ImageOptions
) -> VerifyReport:
    return VerifyReport(
        image=image,
        agent_version=agent.version,
        init=agent.receipt.init,
        checked=len(agent.receipt.entries),
        mismatches=tuple(verify_receipt(agent.receipt, WatchedReader(target.filesystem))),
        disks=source.disks,
    )


def recover(
    image: Path | str,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    control: Control | None = None,
    trust: bool = False,
) -> Recovery:
    """Complete or discard an interrupted injection of an image.

    Args:
        image: a disk image.
        source: how to open the image.
        control: progress and cancellation.
        trust: merge a redo log that this user did not seal on this host.

    Returns:
        ``nothing`` (no redo log), ``discarded`` (an unfinished redo log) or
        ``merged`` (a finished one).

    Raises:
        ImageRecoveryError: the redo log no longer fits the image.
        ImageError: the image cannot be opened, locked or written.
    """
    return recover_image(
        Path(image), stated_format=source.format, control=control or Control(), trust=trust
    )
