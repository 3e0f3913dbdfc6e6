"""One libguestfs handle with its session folder, its time limits and its errors.

Both kinds of appliance have one. It uses the ``direct`` backend and never has a network.
libguestfs's bare ``RuntimeError`` becomes ``ApplianceError`` here, once.
"""

from __future__ import annotations

import collections
import errno
import os
import threading
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.library import guestfs_module, silence_errors
from vmprovision.appliance.watchdog import Watchdog
from vmprovision.errors import ApplianceEndedError, ApplianceError
from vmprovision.host.kernel import appliance_kernel
from vmprovision.host.workspace import make_workspace
from vmprovision.qemu.monitor import GONE, GONE_HINT

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.progress import Control

CHUNK = 2 << 20  # bytes in one call: a message of libguestfs has at most 4 MiB
CALL_SECONDS = 300.0
SESSION = "session"
MONITOR, ATTENDANT = "monitor", "attendant"  # sockets in the session folder
SPECIAL = frozenset(',"\\$`\n')  # QEMU's options and shell scripts give these a meaning
SOCKET_PATH_LIMIT = 107  # unix(7)
MESSAGES_KEPT = 40
LINES_QUOTED = 3


class SessionFolderError(ApplianceError):
    """This host has no folder for a session's sockets."""


class ApplianceCallError(ApplianceError):
    """A libguestfs call failed.

    Attributes:
        number: errno as the appliance saw it, 0 if there is none.
    """

    def __init__(self, message: str, *, number: int) -> None:
        """Keep the errno beside libguestfs's own message."""
        super().__init__(message)
        self.number = number


# The Python binding does not offer guestfs_last_errno; the guest daemon ends its
# messages with strerror(3), in the C locale.
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}


class Handle:
    """A libguestfs handle, before and after its launch.

    Attributes:
        guestfs: the binding's own object.
        folder: the private folder of this session.
        watchdog: the time limits of its calls.
    """

    def __init__(self, control: Control) -> None:
        """Make a handle with a session folder, whose path is QEMU's name (``-name``).

        Raises:
            SessionFolderError: no folder can be made.
            ApplianceError: libguestfs is not installed.
        """
        library = guestfs_module()
        try:
            self._workspace = make_workspace(SESSION, _suits)
        except OSError as exc:
            raise SessionFolderError(
                f"no folder for a session can be made: {exc}",
                hint="check that the cache directory is yours and that its disk is not full",
            ) from exc
        self.folder = self._workspace.path
        self.watchdog = Watchdog(str(self.folder), control)
        self.guestfs: Any = library.GuestFS(python_return_dict=True, close_on_exit=False)
        self._messages: collections.deque[str] = collections.deque(maxlen=MESSAGES_KEPT)
        self._silent = threading.local()
        self.guestfs.set_backend("direct")
        self.guestfs.set_network(False)
        self.guestfs.set_pgroup(True)
        self.guestfs.set_tmpdir(str(self.folder))
        self.guestfs.config("-name", str(self.folder))
        self.guestfs.set_event_callback(
            lambda _event, _handle, text, _numbers: self._messages.append(str(text)),
            library.EVENT_APPLIANCE | library.EVENT_LIBRARY | library.EVENT_WARNING,
        )

    def launch(self, seconds: float, doing: str) -> None:
        """Start QEMU and wait for the daemon in the appliance.

        Args:
            seconds: how long it may take.
            doing: what is being done, for the error if it takes longer.

        Raises:
            ApplianceTimeoutError: it took longer.
            ApplianceError: the appliance did not start.
            CancelledError: the caller cancelled.
        """
        try:
            with self.watchdog.limit(seconds, doing):
                self.guestfs.launch()
        except RuntimeError as exc:
            self.watchdog.raise_cause()
            raise self._launch_failure(exc) from exc

    def call(self, name: str, *arguments: Any, limit: float = CALL_SECONDS, **options: Any) -> Any:  # noqa: ANN401 -- untyped library
        """Return the result of one libguestfs API call, by its name in guestfs(3).

        Raises:
            ApplianceCallError: the call failed; ``number`` carries the guest's errno.
            ApplianceTimeoutError: it took more than ``limit`` seconds.
            ApplianceEndedError: QEMU is gone.
            CancelledError: the caller cancelled.
        """
        if not hasattr(self._silent, "here"):
            silence_errors(self.guestfs)
            self._silent.here = True
        with self.watchdog.limit(limit, name):
            try:
                return getattr(self.guestfs, name)(*arguments, **options)
            except RuntimeError as exc:
                self.watchdog.raise_cause()
                if name != "shutdown" and not self.guestfs.is_ready():
                    raise ApplianceEndedError(GONE, hint=GONE_HINT) from exc
                raise ApplianceCallError(f"appliance: {exc}", number=_number_in(str(exc))) from exc

    def close(self) -> None:
        """End the appliance and remove the session folder."""
        self.watchdog.stop()
        self.guestfs.close()
        self._workspace.remove()

    def _launch_failure(self, exc: RuntimeError) -> ApplianceError:
        """Return the error for a failed launch; only the messages name its cause."""
        lines = [line.strip() for message in self._messages for line in message.splitlines()]
        cause = "; ".join([line for line in lines if line][-LINES_QUOTED:])
        detail = f"{exc}: {cause}" if cause else str(exc)
        if appliance_kernel() is None:
            hint = "make a kernel in /boot readable: `vmprovision doctor` names the command"
        else:
            hint = "`vmprovision doctor` checks this host"
        return ApplianceError(f"the appliance did not start: {detail}", hint=hint)


def _suits(folder: Path) -> bool:
    """Return whether QEMU can take a path, and a socket can have a name in it."""
    is_short = len(os.fsencode(folder / ATTENDANT)) <= SOCKET_PATH_LIMIT
    return is_short and not SPECIAL & {*str(folder)}


def _number_in(message: str) -> int:
    return _NUMBERS.get(message.rpartition(": ")[2], 0)
