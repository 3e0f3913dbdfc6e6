"""Compare a guest with a plan or a receipt: read-only, every mismatch listed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmprovision.changes.receipt import UNFINISHED
from vmprovision.errors import VerificationError

if TYPE_CHECKING:
    from vmprovision.changes.operations import Plan
    from vmprovision.changes.receipt import Receipt
    from vmprovision.filesystem.protocol import GuestReader


def verify_plan(plan: Plan, reader: GuestReader) -> None:
    """Check that the guest meets every end condition of the plan.

    Raises:
        VerificationError: it does not; the error lists every mismatch.
    """
    found = [
        mismatch
        for operation in plan.operations
        for mismatch in operation.condition.mismatches(reader)
    ]
    if found:
        raise VerificationError(
            f"after writing, the guest differs from the plan in {len(found)} ways: {found[0]}",
            mismatches=found,
            hint="the image is unchanged; check the guest's filesystem for damage",
        )


def verify_receipt(receipt: Receipt, reader: GuestReader) -> list[str]:
    """Return each difference between guest and receipt as a sentence, guest path first."""
    unfinished = reader.lstat(UNFINISHED) is not None
    again = f"{UNFINISHED}: a change was interrupted; repeat it, or `vmprovision remove` all of it"
    return [again] * unfinished + [
        mismatch for entry in receipt.entries for mismatch in entry.condition.mismatches(reader)
    ]
