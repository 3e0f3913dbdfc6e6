"""Find the data files that ship with vmprovision beside its code."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vmprovision.errors import VmprovisionError

DataKind = Literal["templates", "images"]


def data_directory(kind: DataKind) -> Path:
    """Return the directory of the templates or of the image recipes.

    It is inside the package if that was installed from a wheel, and at the top level of
    the repository in a checkout.

    Raises:
        VmprovisionError: the installation lacks it.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / kind, package.parent / kind):
        if place.is_dir():
            return place
    raise VmprovisionError(
        f"this installation of vmprovision has no {kind}", hint="install it from its wheel again"
    )
