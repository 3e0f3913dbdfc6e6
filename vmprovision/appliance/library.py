"""The distribution's libguestfs binding: the only module that imports guestfs.

Handles use the ``direct`` backend, never have a network, and keep what the
library and its appliance print, since the cause of a failure stands there only.
"""

from __future__ import annotations

import collections
import importlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision.errors import ApplianceError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

MESSAGES_KEPT = 40


def guestfs_module() -> ModuleType:
    """The distribution's libguestfs binding.

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
    """The QEMU that libguestfs starts on this host.

    Raises:
        ApplianceError: libguestfs or its QEMU is not installed.
    """
    handle = guestfs_module().GuestFS(python_return_dict=True)
    try:
        named = str(handle.get_hv())
    finally:
        handle.close()
    found = shutil.which(named)
    if found is None:
        raise ApplianceError(
            f"{named} is not installed",
            hint="install QEMU for this host's architecture, e.g. qemu-system-x86",
        )
    return Path(found)


class Handle:
    """A libguestfs handle that is yet to be launched.

    Attributes:
        guestfs: the binding's own object.
        messages: the last that the library and its appliance printed.
    """

    def __init__(self, mark: str) -> None:
        """Make one whose QEMU has ``mark`` as the word behind ``-name``."""
        library = guestfs_module()
        self.guestfs: Any = library.GuestFS(python_return_dict=True, close_on_exit=False)
        self.messages: collections.deque[str] = collections.deque(maxlen=MESSAGES_KEPT)
        self.guestfs.set_backend("direct")
        self.guestfs.set_network(False)
        self.guestfs.set_pgroup(True)
        self.guestfs.config("-name", mark)
        self.guestfs.set_event_callback(
            lambda _event, _handle, text, _numbers: self.messages.append(str(text).strip()),
            library.EVENT_APPLIANCE | library.EVENT_LIBRARY | library.EVENT_WARNING,
        )


def launch_failure(exc: RuntimeError, messages: Sequence[str]) -> ApplianceError:
    """The error for a launch that failed, with the cause that libguestfs prints elsewhere."""
    told = [line for message in messages for line in message.splitlines() if line.strip()]
    causes = [line for line in told if "qemu" in line or "supermin" in line or "lock" in line]
    cause = "; ".join((causes or told)[-3:])
    detail = f"{exc}: {cause}" if cause else str(exc)
    if "supermin" in detail or "kernel" in detail:
        hint = "the host's kernel must be readable: `vmprovision doctor` names the command"
    else:
        hint = "`vmprovision doctor` checks this host"
    return ApplianceError(f"the appliance did not start: {detail}", hint=hint)
