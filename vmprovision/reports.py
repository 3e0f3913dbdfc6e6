"""What a caller says of an image, and what the commands report; each with its JSON form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.plan import Operation, describe

if TYPE_CHECKING:
    from pathlib import Path, PurePosixPath

    from vmprovision.guest import GuestInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """How an image is to be opened.

    Attributes:
        format: ``raw``, ``qcow2``, ``vmdk``, ``vdi`` or ``vhdx``; needed where the
            file's name does not say.
        root: the device that holds the guest's root, where there are several.
        allow_backing: follow backing files out of the image's folder.
    """

    format: str | None = None
    root: str | None = None
    allow_backing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedOperation:
    """One operation of a plan, and whether the guest already is as it would make it."""

    operation: Operation
    satisfied: bool

    def as_json(self) -> dict[str, Any]:
        """The operation as ``vmprovision plan --json`` prints it."""
        return {**describe(self.operation), "satisfied": self.satisfied}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What an injection would do, in order; nothing has been written."""

    image: Path
    guest: GuestInfo
    operations: tuple[PlannedOperation, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The report as ``vmprovision plan --json`` prints it."""
        return {
            "image": str(self.image),
            "guest": self.guest.as_json(),
            "operations": [operation.as_json() for operation in self.operations],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeReport:
    """What an injection or a removal found, wrote and verified.

    Attributes:
        image: the image that was worked on, or the new one.
        guest: what was found before.
        changed: guest paths that were written, in order; empty where nothing was to do.
        verified: how many operations' end conditions were seen to hold afterwards.
    """

    image: Path
    guest: GuestInfo
    changed: tuple[PurePosixPath, ...]
    verified: int
    agent_version: str | None = None
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The report as ``vmprovision inject --json`` prints it."""
        return {
            "image": str(self.image),
            "guest": self.guest.as_json(),
            "agent_version": self.agent_version,
            "changed": [str(path) for path in self.changed],
            "verified": self.verified,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """How the guest compares with its receipt.

    Attributes:
        checked: how many paths the receipt names.
        mismatches: one sentence for each difference, guest path first.
    """

    image: Path
    agent_version: str
    init: str
    checked: int
    mismatches: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The report as ``vmprovision verify --json`` prints it."""
        return {
            "image": str(self.image),
            "agent_version": self.agent_version,
            "init": self.init,
            "checked": self.checked,
            "mismatches": list(self.mismatches),
            "ok": not self.mismatches,
        }
