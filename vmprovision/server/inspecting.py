"""Check whether an image can become a template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmprovision.api import plan
from vmprovision.reports import ImageOptions

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.appliance.pool import Pool
    from vmprovision.guest.facts import GuestInfo


def inspect_image(path: Path, image_format: str | None, *, pool: Pool | None) -> GuestInfo:
    """Return the facts about the guest in an image that can be injected; write nothing.

    Raises:
        VmprovisionError: it cannot be injected; the error says why.
    """
    return plan(path, source=ImageOptions(format=image_format), pool=pool).guest
