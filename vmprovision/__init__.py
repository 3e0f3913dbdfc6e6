"""Install a guest agent offline in any Linux disk image.

``inject`` is the main function. It opens an image in a libguestfs appliance, finds out
what the guest is, plans, writes behind a redo log, verifies and merges. It needs no
root, no mounts on the host and no KVM. ``docs/library.md`` shows its use.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from vmprovision.seed.make import SeedOptions, SeedReport, make_seed

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
    "SeedOptions",
    "SeedReport",
    "UnsupportedGuestError",
    "VerificationError",
    "VerifyReport",
    "VmprovisionError",
    "__version__",
    "connect_scheduler",
    "inject",
    "inject_many",
    "inspect",
    "make_seed",
    "plan",
    "prove",
    "recover",
    "remove",
    "verify",
]

# The module of each public name. It is imported at the first use (PEP 562), so that
# `import vmprovision` and `vmprovision --help` load only what they need.
_MODULES = {
    "vmprovision.api": ("inject", "inspect", "plan", "recover", "remove", "verify"),
    "vmprovision.appliance.pool": ("Pool",),
    "vmprovision.batch.dask": ("connect_scheduler",),
    "vmprovision.batch.run": ("inject_many",),
    "vmprovision.errors": (
        "ApplianceError",
        "ApplyError",
        "CancelledError",
        "FleetError",
        "ImageError",
        "InspectionError",
        "PlanError",
        "ProofError",
        "UnsupportedGuestError",
        "VerificationError",
        "VmprovisionError",
    ),
    "vmprovision.guest.facts": ("GuestInfo",),
    "vmprovision.planning.injection": ("InjectOptions",),
    "vmprovision.progress": ("Control", "Progress"),
    "vmprovision.proof.prove": ("ProofOptions", "ProofReport", "prove"),
    "vmprovision.reports": (
        "BatchReport",
        "ChangeReport",
        "ImageOptions",
        "JobResult",
        "PlanReport",
        "VerifyReport",
    ),
    "vmprovision.seed.make": ("SeedOptions", "SeedReport", "make_seed"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
