"""The trial of KVM: the appliance's kernel is booted on it until it prints its first line.

Less proves nothing.  A ``/dev/kvm`` was seen on which QEMU aborts as soon as a
processor is set up, and one that runs an instruction and the firmware and then
hangs for ever.  A kernel that prints has been unpacked and runs in long mode with
paging; with KVM that takes a fraction of a second, and half a second without.

What fails may also be the host's fault: no memory, no process, a damaged QEMU.  So
KVM is blamed only where the same machine can be set up without it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vmprovision.qemu import lifeline

if TYPE_CHECKING:
    from pathlib import Path

Verdict = Literal["works", "fails", "hangs", "untried"]

TRIAL_SECONDS = 3.0
CONTROL_SECONDS = 20.0
KILL_SECONDS = 1.0  # a process that the kernel does not let go is not waited for
MEMORY_MB = 256  # what a distribution's kernel needs to unpack itself
FIRST_LINE = b"Linux version "  # after what firmware and boot stub print
KEPT_BYTES = 64 << 10
# The earliest console that a kernel has, with the board that QEMU needs to be given.
CONSOLES = {
    "x86_64": ((), "earlyprintk=ttyS0,115200 console=ttyS0"),
    "i686": ((), "earlyprintk=ttyS0,115200 console=ttyS0"),
    "aarch64": (("-machine", "virt"), "earlycon console=ttyAMA0"),
    "armv7l": (("-machine", "virt"), "earlycon console=ttyAMA0"),
    "riscv64": (("-machine", "virt"), "earlycon=sbi console=ttyS0"),
    "ppc64le": ((), "console=hvc0"),
    "s390x": ((), "earlyprintk console=ttysclp0"),
}
QUIT = '{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n'


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of a trial.

    Attributes:
        verdict: whether KVM works, fails or hangs; ``untried`` where the host has
            another fault.
        cause: what was seen, for a person.
    """

    verdict: Verdict
    cause: str


def try_kvm(qemu: Path, kernel: Path) -> Trial:
    """Return whether KVM boots a kernel with this QEMU.

    Args:
        qemu: the QEMU program.
        kernel: a kernel of this host, for this host's processor.
    """
    try:
        trial = _boot(qemu, kernel)
        if trial.verdict == "fails" and (other := _fault_without_kvm(qemu, kernel)):
            return Trial(verdict="untried", cause=other)
    except (OSError, subprocess.SubprocessError) as exc:
        return Trial(verdict="untried", cause=f"QEMU cannot be run: {exc}")
    return trial


def _boot(qemu: Path, kernel: Path) -> Trial:
    ours, theirs = socket.socketpair()
    # in memory: a full disk is not to spoil what is seen
    with ours, os.fdopen(os.memfd_create("errors"), "w+b") as errors:
        with theirs:
            process = subprocess.Popen(  # noqa: S603 -- an argument list, never a shell
                lifeline.bound_to(theirs.fileno(), _machine(qemu, kernel, "kvm", "host")),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,
            )
        assert process.stdout is not None  # noqa: S101 -- for mypy: it is a pipe
        begun = time.monotonic()
        with process.stdout:
            try:
                has_printed, has_ended = _wait_for_line(process.stdout.fileno())
            finally:
                _kill(process)
        seconds = time.monotonic() - begun
        if has_printed:
            return Trial(verdict="works", cause=f"{kernel} printed after {seconds:.1f} s")
        if not has_ended:
            cause = f"{kernel} printed nothing within {TRIAL_SECONDS:.0f} s"
            return Trial(verdict="hangs", cause=cause)
        errors.seek(0)
        return Trial(verdict="fails", cause=_complaint(errors.read(KEPT_BYTES), process.returncode))


def _machine(qemu: Path, kernel: Path, accelerator: str, processor: str) -> list[str]:
    board, command_line = CONSOLES.get(os.uname().machine, ((), "console=ttyS0"))
    return [
        *(str(qemu), "-accel", accelerator, "-cpu", processor, *board, "-m", str(MEMORY_MB)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(kernel), "-append", f"{command_line} panic=-1", "-serial", "stdio"),
    ]


def _wait_for_line(console: int) -> tuple[bool, bool]:
    """Return whether the kernel's line came, and whether the console ended before it did."""
    deadline = time.monotonic() + TRIAL_SECONDS
    printed = b""
    with selectors.DefaultSelector() as selector:
        selector.register(console, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            read = os.read(console, KEPT_BYTES)
            printed = (printed + read)[-KEPT_BYTES:]
            if FIRST_LINE in printed:
                return True, False
            if not read:
                return False, True
    return False, False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End QEMU with all that it has started, if they still run."""
    if process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)  # one that ends by itself has a status that says why
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)


def _fault_without_kvm(qemu: Path, kernel: Path) -> str:
    """Return why the machine cannot be set up even without KVM; else an empty string."""
    done = subprocess.run(  # noqa: S603 -- an argument list, never a shell
        [*_machine(qemu, kernel, "tcg", "max")[:-1], "null", "-S", "-qmp", "stdio"],
        input=QUIT.encode(),
        capture_output=True,
        check=False,
        timeout=CONTROL_SECONDS,
    )
    return _complaint(done.stderr, done.returncode) if done.returncode else ""


def _complaint(printed: bytes, status: int | None) -> str:
    """Return the first line that QEMU printed, else how it ended."""
    lines = printed.decode("utf-8", "replace").strip().splitlines()
    return lines[0] if lines else f"QEMU ended with status {status}"
