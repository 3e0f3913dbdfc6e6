"""The caller's options for an image, and the commands' reports, each with its JSON form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from vmprovision.changes.operations import Operation, describe
from vmprovision.errors import VmprovisionError

if TYPE_CHECKING:
    from pathlib import Path, PurePosixPath

    from vmprovision.changes.receipt import Receipt
    from vmprovision.disklayout.keyfile import KeyFile
    from vmprovision.guest.facts import GuestInfo
    from vmprovision.inspection.packages import PackageList


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """How to open an image.

    Attributes:
        format: ``raw``, ``qcow2``, ``vmdk``, ``vdi`` or ``vhdx``; needed if the file's
            name does not state it.
        root: the device of the guest's root, if there are several.
        allow_backing: follow backing files out of the image's folder.
        repair: let QEMU repair, in place, an image that its machine has not closed.
        keys: files that unlock encrypted volumes of the guest.
        disks: the images of the guest's other disks; the image itself is the first one.
        disks_format: the format of all other disks, if their names do not state it.
    """

    format: str | None = None
    root: str | None = None
    allow_backing: bool = False
    repair: bool = False
    keys: tuple[KeyFile, ...] = ()
    disks: tuple[Path, ...] = ()
    disks_format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedOperation:
    """One operation of a plan, and whether the guest already meets its end condition."""

    operation: Operation
    satisfied: bool

    def as_json(self) -> dict[str, Any]:
        """Return the operation as ``vmprovision plan --json`` prints it."""
        return {**describe(self.operation), "satisfied": self.satisfied}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What an injection would do, in order; nothing has been written."""

    image: Path
    guest: GuestInfo
    operations: tuple[PlannedOperation, ...]
    notes: tuple[str, ...] = ()
    disks: tuple[Path, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the report as ``vmprovision plan --json`` prints it."""
        return {
            "image": str(self.image),
            "disks": [str(disk) for disk in self.disks],
            "guest": self.guest.as_json(),
            "operations": [operation.as_json() for operation in self.operations],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeReport:
    """The findings and changes of an injection or a removal.

    Attributes:
        image: the changed image, or the new one.
        guest: the facts before the change.
        changed: guest paths that were written, in order; empty if nothing had to change.
        verified: the number of operations whose end condition was verified afterwards.
        disks: the guest's other images; only those that had to change were written to.
    """

    image: Path
    guest: GuestInfo
    changed: tuple[PurePosixPath, ...]
    verified: int
    agent_version: str | None = None
    notes: tuple[str, ...] = ()
    disks: tuple[Path, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the report as ``vmprovision inject --json`` prints it."""
        return {
            "image": str(self.image),
            "disks": [str(disk) for disk in self.disks],
            "guest": self.guest.as_json(),
            "agent_version": self.agent_version,
            "changed": [str(path) for path in self.changed],
            "verified": self.verified,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The comparison of a guest with its receipt.

    Attributes:
        checked: the number of paths in the receipt.
        mismatches: one sentence for each difference, guest path first.
    """

    image: Path
    agent_version: str
    init: str
    checked: int
    mismatches: tuple[str, ...] = ()
    disks: tuple[Path, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the report as ``vmprovision verify --json`` prints it."""
        return {
            "image": str(self.image),
            "disks": [str(disk) for disk in self.disks],
            "agent_version": self.agent_version,
            "init": self.init,
            "checked": self.checked,
            "mismatches": list(self.mismatches),
            "ok": not self.mismatches,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentsReport:
    """The content of an injected guest: its agent, compared with the receipt, and its packages."""

    guest: GuestInfo
    verification: VerifyReport
    receipt: Receipt
    packages: PackageList


Outcome = Literal["injected", "unchanged", "skipped", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """The result for one image of a batch.

    Attributes:
        image: as the caller named it.
        outcome: ``injected``; ``unchanged`` (the guest needed no change); ``skipped`` (done by an
            earlier run of the batch); ``failed``; ``cancelled``.
        report: the report for an injected or unchanged image, without the thousands of rules
            of its SELinux policy.
        error: why it failed or was cancelled.
        seconds: the duration, without waiting for its turn.
    """

    image: Path
    outcome: Outcome
    report: ChangeReport | None = None
    error: VmprovisionError | None = None
    seconds: float = 0.0

    @property
    def is_fault(self) -> bool:
        """Return whether it failed by a fault of vmprovision itself, which has no class."""
        return type(self.error) is VmprovisionError

    @property
    def exit_code(self) -> int:
        """The command line's exit code for this image alone."""
        return self.error.exit_code if self.error else 0

    def as_json(self) -> dict[str, Any]:
        """Return the result as ``vmprovision inject --json`` prints it for several images."""
        return {
            "image": str(self.image),
            "outcome": self.outcome,
            "seconds": round(self.seconds, 3),
            "report": self.report.as_json() if self.report else None,
            "error": self.error.as_json() if self.error else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReport:
    """The results of a batch, one for every image, in the caller's order."""

    results: tuple[JobResult, ...]

    @property
    def ok(self) -> bool:
        """Return whether every image succeeded."""
        return not self.count("failed", "cancelled")

    def count(self, *outcomes: Outcome) -> int:
        """Return how many images ended with these outcomes."""
        return sum(result.outcome in outcomes for result in self.results)

    def as_json(self) -> dict[str, Any]:
        """Return the report as ``vmprovision inject --json`` prints it for several images."""
        return {
            "ok": self.ok,
            "counts": {outcome: self.count(outcome) for outcome in get_args(Outcome)},
            "results": [result.as_json() for result in self.results],
        }
