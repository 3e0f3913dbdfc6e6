"""Put a running guest agent into any Linux disk image, offline.

``inject`` is the heart: it opens an image in a libguestfs appliance, finds out
what the guest is, plans, writes behind a redo log, verifies and merges.  No
root, no mounts on the host, no KVM needed.  ``docs/library.md`` shows its use.
"""

from vmprovision.errors import (
    ApplianceError,
    ApplyError,
    CancelledError,
    ImageError,
    InspectionError,
    PlanError,
    ProofError,
    UnsupportedGuestError,
    VerificationError,
    VmprovisionError,
)
from vmprovision.guest import GuestInfo
from vmprovision.inject import inject, inspect, plan, recover, remove, verify
from vmprovision.planning import InjectOptions
from vmprovision.progress import Control, Progress
from vmprovision.prove import ProofOptions, ProofReport, prove
from vmprovision.reports import ChangeReport, ImageOptions, PlanReport, VerifyReport

__version__ = "0.1.0"

__all__ = [
    "ApplianceError",
    "ApplyError",
    "CancelledError",
    "ChangeReport",
    "Control",
    "GuestInfo",
    "ImageError",
    "ImageOptions",
    "InjectOptions",
    "InspectionError",
    "PlanError",
    "PlanReport",
    "Progress",
    "ProofError",
    "ProofOptions",
    "ProofReport",
    "UnsupportedGuestError",
    "VerificationError",
    "VerifyReport",
    "VmprovisionError",
    "__version__",
    "inject",
    "inspect",
    "plan",
    "prove",
    "recover",
    "remove",
    "verify",
]
