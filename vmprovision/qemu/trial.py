"""Try KVM: boot the appliance's kernel on it until the kernel prints its first line.

Less proves nothing. On one host QEMU aborts as soon as it sets up a processor; on
another KVM runs the firmware and then hangs for ever. A kernel that prints has
unpacked itself and runs in long mode with paging. That takes a fraction of a second
with KVM, and half a second without.

The failure may also be the host's: no memory, no process, a damaged QEMU. So KVM is
blamed only if the same machine can be set up without it.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vmprovision.qemu.options import accelerator_options
from vmprovision.qemu.process import QemuProcess

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.qemu.options import Accelerator

Verdict = Literal["works", "fails", "hangs", "untried"]

TRIAL_SECONDS = 3.0
CONTROL_SECONDS = 20.0
KILL_SECONDS = 1.0  # the kernel may never let go of a process that hangs in KVM
MEMORY_MB = 256  # what a distribution's kernel needs to unpack itself
FIRST_LINE = b"Linux version "  # after what firmware and boot stub print
KEPT_BYTES = 64 << 10
# The board that QEMU needs to be given, and the kernel's earliest console on it.
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
    """The result of a trial.

    Attributes:
        verdict: whether KVM works, fails or hangs; ``untried`` if the host has
            another fault.
        cause: what was seen, in words for a person.
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
    # in memory, so that a full disk cannot change the result
    with os.fdopen(os.memfd_create("errors"), "w+b") as errors:
        begun = time.monotonic()
        machine = _machine(qemu, kernel, "kvm")
        process = QemuProcess(machine, output=subprocess.PIPE, errors=errors)
        try:
            has_printed, has_ended = _wait_for_line(process)
            seconds = time.monotonic() - begun
            if has_ended:
                process.wait(KILL_SECONDS)  # its own exit status says why
        finally:
            process.end(KILL_SECONDS)
        if has_printed:
            return Trial(verdict="works", cause=f"{kernel} printed after {seconds:.1f} s")
        if not has_ended:
            cause = f"{kernel} printed nothing within {TRIAL_SECONDS:.0f} s"
            return Trial(verdict="hangs", cause=cause)
        errors.seek(0)
        return Trial(verdict="fails", cause=_complaint(errors.read(KEPT_BYTES), process.status))


def _machine(qemu: Path, kernel: Path, accelerator: Accelerator) -> list[str]:
    board, command_line = CONSOLES.get(os.uname().machine, ((), "console=ttyS0"))
    return [
        *(str(qemu), *accelerator_options(accelerator), *board, "-m", str(MEMORY_MB)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(kernel), "-append", f"{command_line} panic=-1", "-serial", "stdio"),
    ]


def _wait_for_line(process: QemuProcess) -> tuple[bool, bool]:
    """Return whether the kernel's line came, and whether the console ended before it did."""
    assert process.output is not None  # noqa: S101 -- for mypy: it is a pipe
    console = process.output.fileno()
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


def _fault_without_kvm(qemu: Path, kernel: Path) -> str:
    """Return why even TCG cannot set up the machine; an empty string if it can."""
    done = subprocess.run(  # noqa: S603 -- an argument list, never a shell
        [*_machine(qemu, kernel, "tcg")[:-1], "null", "-S", "-qmp", "stdio"],
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
