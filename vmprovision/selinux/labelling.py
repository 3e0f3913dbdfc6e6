"""Find the SELinux labels of a plan's new files, by the guest's own rules; pure.

If the guest's rules cannot be evaluated here, ``/.autorelabel`` asks the guest to label
its files at its next boot (selinux(8)). The guest then removes that file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.operations import EditBlock, MakeDirectory, Remove, Symlink, WriteFile
from vmprovision.changes.receipt import ABSENT
from vmprovision.selinux.pathpattern import PatternError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmprovision.changes.conditions import Condition
    from vmprovision.changes.operations import Operation
    from vmprovision.changes.receipt import Found
    from vmprovision.selinux.filecontexts import LabelledKind
    from vmprovision.selinux.policy import SELinuxPolicy

AUTORELABEL = PurePosixPath("/.autorelabel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The labels by guest path, and why some are missing; empty if none is."""

    by_path: Mapping[PurePosixPath, str] = field(default_factory=dict)
    obstacle: str = ""

    def give(self, operation: Operation) -> Operation:
        """Return the operation with its label, or unchanged if there is none."""
        label = self.by_path.get(operation.path)
        if label is None or isinstance(operation, Remove):
            return operation
        return replace(operation, label=label)

    def recorded(self, operation: Operation) -> Condition:
        """Return a condition for the receipt, with a label only from the guest's rules."""
        return (operation if self.obstacle else self.give(operation)).condition


def find_labels(
    policy: SELinuxPolicy | None,
    operations: Iterable[Operation],
    found: Mapping[PurePosixPath, Found],
) -> Labels:
    """Return the labels that the guest's policy gives to the files that these operations make.

    Args:
        policy: the guest's policy, if it has one.
        operations: the plan's operations.

        found: what is at their paths now; an edited file keeps its label.
    """
    if policy is None:
        return Labels()
    kinds = {
        operation.path: _kind_of(operation)
        for operation in operations
        if not isinstance(operation, Remove) and not _is_edit(operation, found)
    }
    obstacle = policy.obstacle
    if policy.contexts is not None:
        labels = {}
        try:
            for path, kind in kinds.items():
                if label := policy.contexts.label_for(path, kind):
                    labels[path] = label
        except PatternError as exc:
            obstacle = f"its rules cannot be evaluated here: {exc}"
        else:
            return Labels(by_path=labels)
    # keep labels that the guest itself has set since an earlier injection
    known = {path: found.get(path, ABSENT).label for path in kinds if policy.takes_labels}
    kept = {path: label for path, label in known.items() if label is not None}
    return Labels(by_path=kept, obstacle=obstacle)


def _is_edit(operation: Operation, found: Mapping[PurePosixPath, Found]) -> bool:
    return (
        isinstance(operation, EditBlock)
        and operation.path in found
        and (found[operation.path].kind != "absent")
    )


def _kind_of(operation: Operation) -> LabelledKind:
    if isinstance(operation, MakeDirectory):
        return "directory"
    return "symlink" if isinstance(operation, Symlink) else "file"


def request_relabelling(
    policy: SELinuxPolicy | None,
    labels: Labels,
    operations: Iterable[Operation],
    found: Mapping[PurePosixPath, Found],
) -> tuple[list[WriteFile], list[str]]:
    """Return an operation that makes the guest label its files at its next boot, and a note.

    Return nothing if all new files have their labels, or if SELinux is disabled: enabling it
    labels all files anyway.

    Args:
        policy: the guest's policy, if it has one.
        labels: what ``find_labels`` found.
        operations: of the plan.
        found: what is at their paths now.

    """
    if policy is None or policy.mode == "disabled" or not labels.obstacle:
        return [], []
    lacking = [
        operation.path
        for operation in operations
        if operation.path not in labels.by_path and not _is_edit(operation, found)
    ]
    if not lacking:
        return [], []
    note = (
        f"the guest relabels its files for SELinux at its next boot, "
        f"as {AUTORELABEL} asks, and then reboots, because {labels.obstacle}"
    )
    there = found.get(AUTORELABEL, ABSENT).kind != "absent"
    return [] if there else [WriteFile(path=AUTORELABEL, content=b"")], [note]
