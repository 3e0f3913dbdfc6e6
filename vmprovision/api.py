"""The straight line: open the image, inspect, plan, apply, verify, commit.

Every public function takes a disk image, or a directory that holds an unpacked
root filesystem.  Nothing here is shared between calls, so they may run in as
many threads as the host has memory for appliances.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.appliance.drives import drive_of
from vmprovision.appliance.mounting import recognise_system
from vmprovision.appliance.roots import SOLE_DISK, mount_guest
from vmprovision.appliance.session import open_appliance, open_disks
from vmprovision.changes.apply import apply_plan
from vmprovision.changes.operations import Plan, is_satisfied
from vmprovision.changes.receipt import RECEIPT, UNFINISHED, Entry
from vmprovision.changes.verify import verify_plan, verify_receipt
from vmprovision.disklayout.keyfile import read_keys
from vmprovision.errors import NoOperatingSystemError, PlanError
from vmprovision.filesystem.deployment import disk_path
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.filesystem.protocol import Attributes, GuestFilesystem
from vmprovision.image.disk import Recovery, recover_image
from vmprovision.image.imageset import commit_images, open_images
from vmprovision.inspection import explain_init, inspect_guest
from vmprovision.inspection.layout import DIRECTORIES
from vmprovision.inspection.ostree import enter_deployment
from vmprovision.inspection.packages import list_packages
from vmprovision.inspection.watched import WatchedReader
from vmprovision.mounts import find_hidden
from vmprovision.naming import naming
from vmprovision.planning.injection import (
    InjectOptions,
    plan_injection,
    plan_removal,
    refuse_without_service,
)
from vmprovision.planning.restoration import (
    notes_on_names,
    restoration,
    survey,
    with_receipt,
)
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
from vmprovision.runtime.choice import choose_runtime
from vmprovision.selinux.labelling import AUTORELABEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from vmprovision.appliance.session import Appliance, Appliances
    from vmprovision.changes.receipt import Found
    from vmprovision.guest.facts import GuestInfo, InitSystem, InstalledAgent
    from vmprovision.image.disk import OpenImage
    from vmprovision.runtime.archive import Archive

log = logging.getLogger(__name__)

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
    """What the guest in an image is; nothing is written.

    Args:
        image: a disk image, or a directory with an unpacked root filesystem.
        source: how to open the image.
        init: the init system, where the caller knows better than the evidence.
        explain: also find all that speaks for other init systems, as ``init.hints``.
        pool: where an appliance for it stands ready.
        control: progress and cancellation.

    Raises:
        VmprovisionError: one of its kinds; the message names the image.
    """
    with _opened(Path(image), _access(source, init, pool, control)) as opened:
        return explain_init(opened.filesystem, opened.guest) if explain else opened.guest


def plan(
    image: Path | str,
    options: InjectOptions = NO_OPTIONS,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    pool: Appliances | None = None,
    control: Control | None = None,
) -> PlanReport:
    """The ordered operations that ``inject`` would make; nothing is written.

    Raises:
        VmprovisionError: as ``inject``.
    """
    with _opened(Path(image), _access(source, options.init, pool, control)) as opened:
        planned = _plan_injection(opened, build_archive(), options)
        operations = tuple(
            PlannedOperation(
                operation=operation, satisfied=is_satisfied(operation, opened.filesystem)
            )
            for operation in planned.operations
        )
        notes = (*planned.notes, *notes_on_names(planned, opened.filesystem))
        return PlanReport(
            image=Path(image),
            guest=opened.guest,
            operations=operations,
            notes=notes,
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
    """Put the agent into the guest; the image is afterwards finished, or as it was to the byte.

    A guest that already is as wanted is not written to.

    Args:
        image: a disk image, or a directory with an unpacked root filesystem.
        options: what is wanted; what they leave open stays as it is in the guest.
        source: how to open the image.
        output: keep the image and write this new one.
        pool: where an appliance for it stands ready.
        control: progress and cancellation.

    Raises:
        ImageError: the image cannot be opened, locked, written or merged.
        ApplianceError: the appliance did not start or failed.
        InspectionError: what the guest is cannot be found out.
        UnsupportedGuestError: nothing of ours is right for this guest.
        BundledRuntimeError: the runtime for it is damaged, or the given one not for it.
        PlanError: the options do not fit.
        ApplyError: writing inside the guest failed.
        VerificationError: what was written is not what is there.
        CancelledError: ``control.cancelled`` was set.
    """
    archive = build_archive()
    return _change(
        Path(image),
        lambda opened: _plan_injection(opened, archive, options),
        _access(source, options.init, pool, control),
        output=Path(output) if output is not None else None,
        agent_version=archive.version,
    )


def remove(
    image: Path | str,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    pool: Appliances | None = None,
    control: Control | None = None,
) -> ChangeReport:
    """Take the agent out of the guest and bring back what stood there, to byte, mode and owner.

    Set-user-id, set-group-id and sticky bits are not brought back: a receipt is a guest's claim.

    Raises:
        PlanError: the guest holds no agent of ours, or what was set aside is gone.
        VmprovisionError: otherwise as ``inject``.
    """
    return _change(
        Path(image),
        _plan_removal,
        _access(source, None, pool, control),
    )


def verify(
    image: Path | str,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    pool: Appliances | None = None,
    control: Control | None = None,
) -> VerifyReport:
    """How the guest compares with the receipt that the injection left in it.

    Raises:
        PlanError: the guest holds no agent of ours.
        VmprovisionError: otherwise as ``inspect``.
    """
    with _opened(Path(image), _access(source, None, pool, control)) as opened:
        return _verification(Path(image), _installed_agent(opened), opened.filesystem, source)


def list_contents(
    image: Path | str,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    pool: Appliances | None = None,
    control: Control | None = None,
) -> ContentsReport:
    """Return what an injected guest holds: ``verify``'s report, the receipt and the packages.

    Raises:
        VmprovisionError: as ``verify``.
    """
    with _opened(Path(image), _access(source, None, pool, control)) as opened:
        agent = _installed_agent(opened)
        return ContentsReport(
            guest=opened.guest,
            verification=_verification(Path(image), agent, opened.filesystem, source),
            receipt=agent.receipt,
            packages=list_packages(WatchedReader(opened.filesystem)),
        )


def _installed_agent(opened: _Opened) -> InstalledAgent:
    """Return the agent that is in the guest.

    Raises:
        PlanError: there is none.
    """
    if opened.guest.agent is None:
        raise PlanError("the guest holds no agent of ours", hint="inject it first")
    return opened.guest.agent


def _verification(
    image: Path, agent: InstalledAgent, filesystem: GuestFilesystem, source: ImageOptions
) -> VerifyReport:
    return VerifyReport(
        image=image,
        agent_version=agent.version,
        init=agent.receipt.init,
        checked=len(agent.receipt.entries),
        mismatches=tuple(verify_receipt(agent.receipt, WatchedReader(filesystem))),
        disks=source.disks,
    )


def recover(
    image: Path | str,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    control: Control | None = None,
    trust: bool = False,
) -> Recovery:
    """Complete or discard what an interrupted injection left beside an image.

    Args:
        image: a disk image.
        source: how to open the image.
        control: progress and cancellation.
        trust: merge a redo log though this user has not sealed it on this host.

    Returns:
        ``nothing`` (there was nothing), ``discarded`` (an unfinished redo log) or
        ``merged`` (a finished one).

    Raises:
        ImageRecoveryError: the redo log does not fit the image any more.
        ImageError: the image cannot be opened, locked or written.
    """
    return recover_image(
        Path(image), stated_format=source.format, control=control or Control(), trust=trust
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A guest that is open for reading or writing, and what is known of it."""

    guest: GuestInfo
    filesystem: GuestFilesystem


def _plan_injection(opened: _Opened, archive: Archive, options: InjectOptions) -> Plan:
    refuse_without_service(opened.guest, options)
    runtime = choose_runtime(opened.guest, options.runtime)
    planned = plan_injection(opened.guest, archive, options, runtime)
    earlier = opened.guest.agent.receipt.paths if opened.guest.agent else ()
    paths = dict.fromkeys([*planned.paths, *earlier])
    if opened.guest.selinux:
        paths |= dict.fromkeys([AUTORELABEL, opened.guest.locate(RECEIPT)])
    found = survey(paths, WatchedReader(opened.filesystem))
    return with_receipt(planned, opened.guest, found, archive.version)


def _plan_removal(opened: _Opened) -> Plan:
    agent = opened.guest.agent
    paths = agent.receipt.paths if agent else ()
    found = survey(paths, WatchedReader(opened.filesystem))
    return plan_removal(opened.guest, found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Access:
    """How a guest is opened, and who watches over the work.

    Attributes:
        appliance: opens an appliance with drives, as ``open_appliance`` does.
    """

    source: ImageOptions
    init: InitSystem | None
    control: Control
    appliance: Callable[..., AbstractContextManager[Appliance]]


def _access(
    source: ImageOptions, init: InitSystem | None, pool: Appliances | None, control: Control | None
) -> _Access:
    return _Access(
        source=source,
        init=init,
        control=control or Control(),
        appliance=pool.open if pool else open_appliance,
    )


def _change(
    path: Path,
    planner: Callable[[_Opened], Plan],
    access: _Access,
    *,
    output: Path | None = None,
    agent_version: str | None = None,
) -> ChangeReport:
    """Plan, apply and verify; commit where anything was written."""
    if path.is_dir():
        if output is not None:
            raise PlanError(
                f"{path} is a directory and is written in place",
                hint="copy it first instead of using --output",
            )
        with _opened_directory(path, access, write=True) as opened:
            return _change_directory(path, opened, planner, access.control, agent_version)
    if output is not None and access.source.disks:
        raise PlanError(
            "--output writes one new image, and the guest has several",
            hint="copy all of them first, and work on the copies",
        )
    with (
        naming(path),
        open_images(
            _images_of(path, access.source),
            write=True,
            control=access.control,
            output=output,
            allow_outside=access.source.allow_backing,
            repair=access.source.repair,
        ) as images,
    ):
        with _opened_images(images, access, write=True) as opened:
            report = _carry_out(
                output or path, opened, planner(opened), access.control, agent_version
            )
        if report.changed or output is not None:
            commit_images(images, access.control)
        return replace(report, disks=access.source.disks)


def _images_of(path: Path, source: ImageOptions) -> dict[Path, str | None]:
    """The guest's images, each with the format that the caller states."""
    if len({path, *source.disks}) <= len(source.disks):
        raise PlanError("one disk is given twice", hint="name each disk of the guest once")
    return {path: source.format, **dict.fromkeys(source.disks, source.disks_format)}


def _carry_out(
    path: Path, opened: _Opened, planned: Plan, control: Control, agent_version: str | None
) -> ChangeReport:
    notes = (*planned.notes, *notes_on_names(planned, opened.filesystem))
    applied = apply_plan(planned, opened.filesystem, control)
    control.step("verifying")
    verify_plan(planned, opened.filesystem)
    return ChangeReport(
        image=path,
        guest=opened.guest,
        changed=tuple(operation.path for operation in applied),
        verified=len(planned.operations),
        agent_version=agent_version,
        notes=notes,
    )


def _change_directory(
    path: Path,
    opened: _Opened,
    planner: Callable[[_Opened], Plan],
    control: Control,
    agent_version: str | None,
) -> ChangeReport:
    """As for an image, without a redo log.

    What may change is written down first, so that a run after a crash knows what was there;
    on failure what was found is put back.
    """
    filesystem, agent = opened.filesystem, opened.guest.agent
    planned = planner(opened)
    if all(is_satisfied(operation, filesystem) for operation in planned.operations):
        return _carry_out(path, opened, planned, control, agent_version)
    before = survey([*planned.paths, UNFINISHED], filesystem)
    filesystem.write(UNFINISHED, planned.intent, Attributes(mode=0o600))
    try:
        report = _carry_out(path, opened, planned, control, agent_version)
    except BaseException:
        _put_back(planned, before, filesystem)
        if agent is None or not agent.unfinished:
            filesystem.remove(UNFINISHED)
        raise
    if filesystem.lstat(UNFINISHED):
        filesystem.remove(UNFINISHED)
    return report


def _clear_up(filesystem: LocalFilesystem, files: GuestFilesystem, guest: GuestInfo) -> None:
    """Take away what a run that was killed has left under temporary names."""
    folders = {UNFINISHED.parent}
    if guest.agent and guest.agent.unfinished:
        paths = (*guest.agent.receipt.paths, guest.locate(RECEIPT))
        folders |= {disk_path(files, path.parent) for path in paths}
    filesystem.clear(sorted(folders))


def _put_back(
    planned: Plan, before: dict[PurePosixPath, Found], filesystem: GuestFilesystem
) -> None:
    now = survey(planned.paths, filesystem)
    entries = [
        Entry(
            condition=operation.condition,
            before=replace(before[operation.path], kept=operation.path),
        )
        for operation in planned.operations
    ]
    undo = [
        operation
        for entry in reversed(entries)
        for operation in restoration(entry, now[entry.condition.path], before)
    ]
    apply_plan(Plan(operations=tuple(undo)), filesystem, Control())


@contextlib.contextmanager
def _opened(path: Path, access: _Access) -> Iterator[_Opened]:
    """A guest to read, in an image or a directory."""
    if path.is_dir():
        with _opened_directory(path, access) as opened:
            yield opened
        return
    with (
        naming(path),
        open_images(
            _images_of(path, access.source),
            write=False,
            control=access.control,
            allow_outside=access.source.allow_backing,
        ) as images,
        _opened_images(images, access, write=False) as opened,
    ):
        yield opened


@contextlib.contextmanager
def _opened_images(
    images: Sequence[OpenImage], access: _Access, *, write: bool
) -> Iterator[_Opened]:
    keys = read_keys(access.source.keys)
    access.control.step("starting the appliance")
    drives = [drive_of(image.layer, readonly=not write) for image in images]
    with open_disks(access.appliance, drives, access.control) as appliance:
        access.control.step("inspecting the guest")
        mounted = mount_guest(
            appliance,
            wanted=access.source.root,
            readonly=not write,
            disk=SOLE_DISK if len(images) == 1 else None,
            keys=keys,
        )
        guest = inspect_guest(
            mounted.filesystem,
            init=access.init,
            mountpoints=mounted.mountpoints,
            hidden=mounted.hidden,
            notes=mounted.notes,
        )
        yield _Opened(guest=guest, filesystem=mounted.filesystem)


@contextlib.contextmanager
def _opened_directory(path: Path, access: _Access, *, write: bool = False) -> Iterator[_Opened]:
    if access.source.disks:
        raise PlanError(
            f"{path} is a directory and has no other disks", hint="leave out the other disks"
        )
    filesystem = LocalFilesystem(path.resolve())
    with naming(path), filesystem.locked() if write else contextlib.nullcontext():
        access.control.step("inspecting the guest")
        if recognise_system(filesystem) != "linux":
            raise NoOperatingSystemError(
                "the directory does not hold the root filesystem of a Linux guest",
                hint="give the directory that has /etc in it",
            )
        files = enter_deployment(filesystem)
        hidden, notes = find_hidden(files, filesystem.root, map(PurePosixPath, DIRECTORIES))
        guest = inspect_guest(files, init=access.init, hidden=hidden, notes=notes)
        if write:
            _clear_up(filesystem, files, guest)
        yield _Opened(guest=guest, filesystem=files)
