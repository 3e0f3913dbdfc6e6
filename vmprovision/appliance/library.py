"""The distribution's libguestfs binding: the only module that imports guestfs."""

from __future__ import annotations

import ctypes
import importlib
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision.errors import ApplianceError

if TYPE_CHECKING:
    from types import ModuleType

log = logging.getLogger(__name__)


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


def silence_errors(handle: Any) -> None:  # noqa: ANN401 -- untyped library
    """Keep libguestfs from printing the errors of a handle's calls in this thread.

    They are exceptions anyway, and have names from the guest in them. The handler belongs to
    one thread (guestfs(3), "ERROR HANDLING"), and the binding removes only that of the thread
    which makes the handle.
    """
    try:
        pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
        pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]
        pointer_of.restype = ctypes.c_void_p
        remove = ctypes.CDLL("libguestfs.so.0").guestfs_set_error_handler
        remove.argtypes, remove.restype = [ctypes.c_void_p] * 3, None
        remove(pointer_of(handle._o, b"guestfs_h"), None, None)  # noqa: SLF001 -- the C handle
    except (AttributeError, OSError, ValueError) as exc:
        log.debug("libguestfs may print errors itself: %s", exc)


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
