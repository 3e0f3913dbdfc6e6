"""One libguestfs appliance: launched, called under time limits, closed for certain.

The only module that imports guestfs.  Its bare ``RuntimeError`` becomes
``ApplianceError`` here, once.  Appliances use the ``direct`` backend, never have
a network, and run on KVM only where a trial showed that it works.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import importlib
import logging
import os
import shutil
import signal
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.accelerator import choose_accelerator, forget_kvm
from vmprovision.errors import ApplianceError, ApplianceTimeoutError, CancelledError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

    from vmprovision.progress import Control

log = logging.getLogger(__name__)

LAUNCH_SECONDS = 240.0  # 8 s on an idle host without KVM; a loaded CI host is far slower
# With KVM it is done in seconds; a KVM that runs and then hangs was seen, too.
KVM_LAUNCH_SECONDS = 30.0
CALL_SECONDS = 300.0
WATCH_SECONDS = 0.1
MESSAGES_KEPT = 40
LAUNCHES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """A disk for the appliance.

    Attributes:
        path: the file on the host.
        format: its format, always stated: a guessed format is a guest's choice.
        readonly: writes go to a throwaway snapshot.
    """

    path: Path
    format: str
    readonly: bool = False


class Appliance:
    """A running appliance; every call has a time limit and can be cancelled.

    One thread at a time uses an appliance; many appliances run side by side.
    """

    def __init__(self, handle: Any, watchdog: _Watchdog) -> None:  # noqa: ANN401 -- untyped library
        """Take a launched handle and what watches over it."""
        self._handle = handle
        self._watchdog = watchdog

    def call(self, name: str, *arguments: Any, limit: float = CALL_SECONDS, **options: Any) -> Any:  # noqa: ANN401 -- untyped library
        """The result of one libguestfs API call, by its name in guestfs(3).

        Raises:
            ApplianceError: the call failed; ``number`` carries the guest's errno.
            ApplianceTimeoutError: it took more than ``limit`` seconds.
            CancelledError: the caller cancelled.
        """
        with self._watchdog.limit(limit, name):
            try:
                return getattr(self._handle, name)(*arguments, **options)
            except RuntimeError as exc:
                self._watchdog.raise_cause()
                raise ApplianceCallError(f"appliance: {exc}", number=_number_in(str(exc))) from exc


class ApplianceCallError(ApplianceError):
    """A libguestfs call failed.

    Attributes:
        number: errno as the appliance saw it, 0 where there is none.
    """

    def __init__(self, message: str, *, number: int) -> None:
        """Keep the errno beside libguestfs's own message."""
        super().__init__(message)
        self.number = number


# The Python binding does not offer guestfs_last_errno; the guest daemon ends its
# messages with strerror(3), in the C locale.
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}


def _number_in(message: str) -> int:
    return _NUMBERS.get(message.rpartition(": ")[2], 0)


@contextlib.contextmanager
def launch(drives: Sequence[Drive], *, control: Control) -> Iterator[Appliance]:
    """A running appliance with these drives, in their order; closed at the end.

    Leaving the block without an error flushes and shuts the appliance down
    first, and a write that could not reach the disk raises.

    Raises:
        ApplianceError: libguestfs is missing or the appliance did not start.
        ApplianceTimeoutError: it did not start in time.
        CancelledError: the caller cancelled.
    """
    handle, watchdog = _start(drives, control)
    appliance = Appliance(handle, watchdog)
    try:
        yield appliance
        appliance.call("shutdown")
    finally:
        watchdog.stop()
        handle.close()


def _start(drives: Sequence[Drive], control: Control) -> tuple[Any, _Watchdog]:
    """A launched handle in which the drives have libguestfs's names, in their order.

    When udev is late in the appliance, its daemon gives the kernel's own names,
    in which the appliance's root is one of the disks and ours come after it.
    """
    expected = [f"/dev/sd{chr(ord('a') + number)}" for number in range(len(drives))]
    for _ in range(LAUNCHES):
        handle, watchdog = _launch_on_what_works(drives, control)
        named = handle.list_devices()
        if named == expected:
            return handle, watchdog
        log.warning("the appliance calls its disks %s; starting another one", named)
        watchdog.stop()
        handle.close()
    raise ApplianceError(
        "the appliance does not name its disks in their order",
        hint="the host is overloaded: try again when it is less so",
    )


def _launch_on_what_works(drives: Sequence[Drive], control: Control) -> tuple[Any, _Watchdog]:
    qemu = qemu_program()
    choice = choose_accelerator(qemu)
    try:
        return _launch_once(drives, control, kvm=choice.accelerator == "kvm")
    except ApplianceError as exc:
        if choice.accelerator != "kvm":
            raise
        forget_kvm(qemu, f"an appliance did not start on it: {exc.message}")
        return _launch_once(drives, control, kvm=False)


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


def _launch_once(drives: Sequence[Drive], control: Control, *, kvm: bool) -> tuple[Any, _Watchdog]:
    guestfs = guestfs_module()
    handle = guestfs.GuestFS(python_return_dict=True, close_on_exit=False)
    mark = f"vmprovision-{uuid.uuid4().hex}"
    watchdog = _Watchdog(mark, control)
    messages: collections.deque[str] = collections.deque(maxlen=MESSAGES_KEPT)
    try:
        handle.set_backend("direct")
        if not kvm:
            handle.set_backend_setting("force_tcg", "1")
        handle.set_network(False)
        handle.set_pgroup(True)
        handle.config("-name", mark)
        handle.set_event_callback(
            lambda _event, _handle, text, _numbers: messages.append(str(text).strip()),
            guestfs.EVENT_APPLIANCE | guestfs.EVENT_LIBRARY | guestfs.EVENT_WARNING,
        )
        for drive in drives:
            handle.add_drive_opts(str(drive.path), format=drive.format, readonly=drive.readonly)
        begun = time.monotonic()
        with watchdog.limit(KVM_LAUNCH_SECONDS if kvm else LAUNCH_SECONDS, "launch"):
            handle.launch()
        log.debug("appliance up in %.1f s, kvm=%s", time.monotonic() - begun, kvm)
    except RuntimeError as exc:
        watchdog.stop()
        handle.close()
        watchdog.raise_cause()
        raise _launch_failure(exc, messages) from exc
    except BaseException:
        watchdog.stop()
        handle.close()
        raise
    return handle, watchdog


def _launch_failure(exc: RuntimeError, messages: Sequence[str]) -> ApplianceError:
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


class _Watchdog:
    """Ends the appliance's QEMU when a call outlasts its limit or the caller cancels.

    libguestfs has no time limits, and a call on a handle blocks every other
    call on it, so the only way out of a stuck call is to end the process that
    it waits for.  It is known by the unique name on its command line and by
    being our child.
    """

    def __init__(self, mark: str, control: Control) -> None:
        self._mark = mark.encode()
        self._control = control
        self._deadline = float("inf")
        self._doing = ""
        self._cause: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=mark, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def limit(self, seconds: float, doing: str) -> Iterator[None]:
        """Allow the call in this block so many seconds."""
        if self._control.cancelled.is_set():
            raise CancelledError("cancelled", hint="the image is as it was")
        self.raise_cause()
        self._doing = doing
        self._deadline = time.monotonic() + seconds
        try:
            yield
        finally:
            self._deadline = float("inf")

    def raise_cause(self) -> None:
        """Raise what made the watchdog end the appliance, if it did."""
        if self._cause:
            raise self._cause

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(WATCH_SECONDS):
            if self._cause is None:
                if self._control.cancelled.is_set():
                    self._cause = CancelledError("cancelled", hint="the image is as it was")
                elif time.monotonic() > self._deadline:
                    self._cause = ApplianceTimeoutError(
                        f"the appliance was not done with {self._doing} in time",
                        hint="the host is overloaded, its disk is full, or the image is damaged",
                    )
            if self._cause is not None:
                self._end_qemu()

    def _end_qemu(self) -> None:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and self._is_ours(entry):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(entry.name), signal.SIGKILL)

    def _is_ours(self, entry: Path) -> bool:
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            # the command name may hold spaces and brackets: fields count from the last bracket
            parent = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
        return self._mark in words and parent == os.getpid()
