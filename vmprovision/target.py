"""Open the guest in a disk image or a directory, and commit the changes of a plan.

A ``Target`` hides which of the two it is. Leaving its block without ``commit`` leaves
the guest unchanged: an image's redo log is discarded, and changes in a directory are
undone.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Protocol

from vmprovision.appliance.drives import drive_of
from vmprovision.appliance.mounting import recognise_system
from vmprovision.appliance.roots import SOLE_DISK, mount_guest
from vmprovision.appliance.session import open_appliance, open_disks
from vmprovision.appliance.snapshots import discard_snapshot, finish_snapshot
from vmprovision.changes.apply import apply_plan
from vmprovision.changes.operations import Plan, is_satisfied
from vmprovision.changes.receipt import RECEIPT, UNFINISHED, Entry
from vmprovision.disklayout.keyfile import read_keys
from vmprovision.errors import NoOperatingSystemError, PlanError, about_image
from vmprovision.filesystem.deployment import disk_path
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.filesystem.protocol import Attributes
from vmprovision.image.imageset import commit_images, open_images
from vmprovision.inspection import inspect_guest
from vmprovision.inspection.layout import DIRECTORIES
from vmprovision.inspection.ostree import enter_deployment
from vmprovision.mounts import find_hidden
from vmprovision.planning.restoration import restoration, survey
from vmprovision.progress import Control

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from vmprovision.appliance.drives import Drive
    from vmprovision.appliance.mounting import MountedGuest
    from vmprovision.appliance.session import Appliance, Appliances
    from vmprovision.changes.operations import Operation
    from vmprovision.changes.receipt import Found
    from vmprovision.filesystem.protocol import GuestFilesystem
    from vmprovision.guest.facts import GuestInfo, InitSystem
    from vmprovision.image.disk import OpenImage
    from vmprovision.reports import ImageOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How to open a guest.

    Attributes:
        source: the caller's options for the image.
        control: progress and cancellation.
        init: the init system, if the caller overrides the evidence.
        pool: a source of ready appliances, or None to start one.
    """

    source: ImageOptions
    control: Control
    init: InitSystem | None = None
    pool: Appliances | None = None


class Target(Protocol):
    """An open guest with its facts and its files."""

    @property
    def guest(self) -> GuestInfo:
        """The facts about the guest, as they were before any change."""

    @property
    def filesystem(self) -> GuestFilesystem:
        """The guest's files."""

    def apply(self, plan: Plan) -> list[Operation]:
        """Carry out a plan; return the operations that changed something.

        Raises:
            ApplyError: an operation failed.
        """

    def commit(self) -> None:
        """Make the changes permanent.

        Raises:
            ImageError: the redo logs could not be merged.
            ApplianceError: a write did not reach the disk.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDisks:
    """A guest whose disks are in an appliance and whose root is mounted there."""

    guest: GuestInfo
    appliance: Appliance
    mounted: MountedGuest


@contextlib.contextmanager
def open_target(
    path: Path, access: Access, *, write: bool, output: Path | None = None
) -> Iterator[Target]:
    """Open and inspect the guest in a disk image or a directory.

    Args:
        path: a disk image, or a directory with an unpacked root filesystem.
        access: how to open it.
        write: allow ``apply`` and ``commit``.
        output: keep the image; ``commit`` writes this new image.

    Raises:
        PlanError: the options do not fit each other.
        VmprovisionError: the guest cannot be opened or inspected.
    """
    opened = (
        _open_directory(path, access, write=write, output=output)
        if path.is_dir()
        else _open_images(path, access, write=write, output=output)
    )
    with about_image(path), opened as target:
        yield target


@contextlib.contextmanager
def open_guest(drives: Sequence[Drive], access: Access, *, write: bool) -> Iterator[OpenDisks]:
    """Start an appliance with these drives, mount the guest on them and inspect it.

    Raises:
        ApplianceError: the appliance did not start.
        InspectionError: the drives have no guest, several, or one that cannot be read.
        UnsupportedGuestError: the guest must not be written to offline.
    """
    keys = read_keys(access.source.keys)
    control = access.control
    control.step("starting the appliance")
    opener = access.pool.open if access.pool else open_appliance
    with open_disks(opener, drives, control) as appliance:
        control.step("inspecting the guest")
        mounted = mount_guest(
            appliance,
            wanted=access.source.root,
            readonly=not write,
            disk=SOLE_DISK if len(drives) == 1 else None,
            keys=keys,
        )
        guest = inspect_guest(
            mounted.filesystem,
            init=access.init,
            mountpoints=mounted.mountpoints,
            hidden=mounted.hidden,
            notes=mounted.notes,
        )
        yield OpenDisks(guest=guest, appliance=appliance, mounted=mounted)


class _ImageTarget:
    """A guest in disk images, written to through their redo logs."""

    def __init__(
        self,
        images: Sequence[OpenImage],
        disks: OpenDisks,
        appliance: contextlib.ExitStack,
        control: Control,
    ) -> None:
        self.guest = disks.guest
        self.filesystem: GuestFilesystem = disks.mounted.filesystem
        self._images = images
        self._disks = disks
        self._appliance = appliance
        self._control = control
        self._is_changed = False

    def apply(self, plan: Plan) -> list[Operation]:
        applied = apply_plan(plan, self.filesystem, self._control)
        self._is_changed = self._is_changed or bool(applied)
        return applied

    def commit(self) -> None:
        """Merge the redo logs; without a change, write only a requested new image."""
        if new := self._disks.mounted.snapshot:
            finish = finish_snapshot if self._is_changed else discard_snapshot
            finish(self._disks.appliance, new)
        # closing the appliance brings every write to the redo logs, or raises
        self._appliance.close()
        if self._is_changed or self._images[0].new is not None:
            commit_images(self._images, self._control)


@contextlib.contextmanager
def _open_images(
    path: Path, access: Access, *, write: bool, output: Path | None
) -> Iterator[_ImageTarget]:
    source = access.source
    if output is not None and source.disks:
        raise PlanError(
            "--output writes one new image, and the guest has several",
            hint="copy all of them first, and work on the copies",
        )
    with (
        open_images(
            _formats_of(path, source),
            write=write,
            control=access.control,
            output=output,
            allow_outside=source.allow_backing,
            repair=write and source.repair,
        ) as images,
        contextlib.ExitStack() as appliance,
    ):
        drives = [drive_of(image.layer, readonly=not write) for image in images]
        disks = appliance.enter_context(open_guest(drives, access, write=write))
        yield _ImageTarget(images, disks, appliance, access.control)


def _formats_of(path: Path, source: ImageOptions) -> dict[Path, str | None]:
    """Return the guest's images, each with the format that the caller states."""
    if len({path, *source.disks}) <= len(source.disks):
        raise PlanError("one disk is given twice", hint="name each disk of the guest once")
    return {path: source.format, **dict.fromkeys(source.disks, source.disks_format)}


class _DirectoryTarget:
    """A guest in a directory, written in place.

    Before any change, a list of all paths that may change is written to the guest.  So a run
    after a crash knows what was there before.
    """

    def __init__(self, guest: GuestInfo, filesystem: GuestFilesystem, control: Control) -> None:
        self.guest = guest
        self.filesystem = filesystem
        self._control = control
        self._plan: Plan | None = None
        self._before: dict[PurePosixPath, Found] = {}

    def apply(self, plan: Plan) -> list[Operation]:
        if not all(is_satisfied(operation, self.filesystem) for operation in plan.operations):
            self._before = survey([*plan.paths, UNFINISHED], self.filesystem)
            self.filesystem.write(UNFINISHED, plan.intent, Attributes(mode=0o600))
            self._plan = plan
        return apply_plan(plan, self.filesystem, self._control)

    def commit(self) -> None:
        if self._plan is None:
            return
        self._plan = None
        if self.filesystem.lstat(UNFINISHED):
            self.filesystem.remove(UNFINISHED)

    def roll_back(self) -> None:
        """Undo a plan's changes; do nothing after ``commit``."""
        if self._plan is None:
            return
        _put_back(self._plan, self._before, self.filesystem)
        if self.guest.agent is None or not self.guest.agent.unfinished:
            self.filesystem.remove(UNFINISHED)


@contextlib.contextmanager
def _open_directory(
    path: Path, access: Access, *, write: bool, output: Path | None
) -> Iterator[_DirectoryTarget]:
    if output is not None:
        raise PlanError(
            "a directory is written in place", hint="copy it first instead of using --output"
        )
    if access.source.disks:
        raise PlanError("a directory has no other disks", hint="leave out the other disks")
    filesystem = LocalFilesystem(path.resolve())
    with filesystem.locked() if write else contextlib.nullcontext():
        access.control.step("inspecting the guest")
        if recognise_system(filesystem) != "linux":
            raise NoOperatingSystemError(
                "the directory is not the root filesystem of a Linux guest",
                hint="give the directory that has /etc in it",
            )
        files = enter_deployment(filesystem)
        hidden, notes = find_hidden(files, filesystem.root, map(PurePosixPath, DIRECTORIES))
        guest = inspect_guest(files, init=access.init, hidden=hidden, notes=notes)
        if write:
            _remove_temporary_files(filesystem, files, guest)
        target = _DirectoryTarget(guest, files, access.control)
        try:
            yield target
        finally:
            target.roll_back()


def _remove_temporary_files(
    filesystem: LocalFilesystem, files: GuestFilesystem, guest: GuestInfo
) -> None:
    """Remove temporary files that a killed run has left."""
    folders = {UNFINISHED.parent}
    if guest.agent and guest.agent.unfinished:
        paths = (*guest.agent.receipt.paths, guest.real_path(RECEIPT))
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
