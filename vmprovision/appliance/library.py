"""The distribution's libguestfs binding: the only module that imports guestfs."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.errors import ApplianceError

if TYPE_CHECKING:
    from types import ModuleType


def guestfs_module() -> ModuleType:
    """Return the distribution's libguestfs binding.

    Raises:
        ApplianceError: this Python has none.
    """
    try:
        return importlib.import_module("guestfs")
    except ImportError as exc:
        raise ApplianceError(
            "the libguestfs binding cannot be imported from this Python",
            hint="install python3-guestfs and use a venv with --system-site-packages on "
            "/usr/bin/python3; `vmprovision doctor` says more",
        ) from exc


def qemu_program() -> Path:
    """Return the QEMU that libguestfs starts on this host.

    Raises:
        ApplianceError: libguestfs or its QEMU is not installed.
    """
    library = guestfs_module().GuestFS(python_return_dict=True)
    try:
        named = str(library.get_hv())
    finally:
        library.close()
    found = shutil.which(named)
    if found is None:
        raise ApplianceError(
            f"{named} is not installed",
            hint="install QEMU for this host's architecture, e.g. qemu-system-x86",
        )
    return Path(found)
