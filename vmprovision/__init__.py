"""Put a running guest agent into any Linux disk image, offline.

``inject`` is the heart: it opens an image in a libguestfs appliance, finds out
what the guest is, plans, writes behind a redo log, verifies and merges.  No
root, no mounts on the host, no KVM needed.  ``docs/library.md`` shows its use.
"""

from vmprovision.api import (
    inject,
    inspect,
    plan,
    recover,
    remove,
    verify,
)
from vmprovision.appliance.pool import Pool
from vmprovision.batch.dask import connect_scheduler
from vmprovision.batch.run import inject_many
from vmprovision.errors import (
    ApplianceError,
    ApplyError,
    CancelledError,
    FleetError,
    ImageError,
    InspectionError,
    PlanError,
    ProofError,
    UnsupportedGuestError,
    VerificationError,
    VmprovisionError,
)
from vmprovision.guest.facts import GuestInfo
from vmprovision.planning.injection import InjectOptions
from vmprovision.progress import Control, Progress
from vmprovision.proof.prove import ProofOptions, ProofReport, prove
from vmprovision.reports import (
    BatchReport,
    ChangeReport,
    ImageOptions,
    JobResult,
    PlanReport,
    VerifyReport,
)

__version__ = "0.1.0"

__all__ = [
    "ApplianceError",
    "ApplyError",
    "BatchReport",
    "CancelledError",
    "ChangeReport",
    "Control",
    "FleetError",
    "GuestInfo",
    "ImageError",
    "ImageOptions",
    "InjectOptions",
    "InspectionError",
    "JobResult",
    "PlanError",
    "PlanReport",
    "Pool",
    "Progress",
    "ProofError",
    "ProofOptions",
    "ProofReport",
    "UnsupportedGuestError",
    "VerificationError",
    "VerifyReport",
    "VmprovisionError",
    "__version__",
    "connect_scheduler",
    "inject",
    "inject_many",
    "inspect",
    "plan",
    "prove",
    "recover",
    "remove",
    "verify",
]
