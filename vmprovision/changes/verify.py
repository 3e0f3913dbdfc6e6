"""Compare a guest with what a plan or a receipt says: read-only, every mismatch listed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmprovision.changes.receipt import UNFINISHED
from vmprovision.errors import VerificationError

if TYPE_CHECKING:
    from vmprovision.changes.operations import Plan
    from vmprovision.changes.receipt import Receipt
    from vmprovision.filesystem.protocol import GuestReader


def verify_plan(plan: Plan, reader: GuestReader) -> None:
    """Assert that the guest is as the plan says.

    Raises:
        VerificationError: it is not; carries every mismatch.
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
            hint="the image is as it was; the guest's filesystem may be damaged",
        )


def verify_receipt(receipt: Receipt, reader: GuestReader) -> list[str]:
    """Return each difference between guest and receipt as a sentence, guest path first."""
    unfinished = reader.lstat(UNFINISHED) is not None
    again = f"{UNFINISHED}: a change was interrupted; repeat it, or `vmprovision remove` all of it"
    return [again] * unfinished + [
        mismatch for entry in receipt.entries for mismatch in entry.condition.mismatches(reader)
    ]
