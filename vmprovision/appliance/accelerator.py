"""KVM where it truly works, else QEMU's own translator (TCG): found out by trying.

A ``/dev/kvm`` that exists proves nothing: nested machines and CI hosts often
have one on which QEMU aborts as soon as a virtual CPU is set up.  So a QEMU
without any disk is started on it once; the answer is remembered until the host
boots again or QEMU changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vmprovision.cache import cache_directory, write_atomically

log = logging.getLogger(__name__)

Accelerator = Literal["kvm", "tcg"]

KVM = Path("/dev/kvm")
PROBE_SECONDS = 8.0
# A PC's firmware of one act: its processor, told to, ends QEMU with this status.
# So KVM has truly run an instruction; some QEMUs fail no earlier than that.
#   mov al, 0x20; out 0xf4, al; hlt -- at the address where the processor starts
FIRMWARE_SIZE = 1 << 16
RESET_CODE = bytes.fromhex("b020e6f4f4").ljust(16, b"\0")
TRIAL_STATUS = 0x20 << 1 | 1
# Elsewhere the monitor has to do: the processors are reset before it can answer
# that the machine runs.
VIRT_MACHINES = ("aarch64", "armv7l", "riscv64")
PROBE_TALK = '{"execute":"qmp_capabilities"}\n{"execute":"query-status"}\n{"execute":"quit"}\n'


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorChoice:
    """The accelerator to use and why, in words for a person."""

    accelerator: Accelerator
    reason: str


def choose_accelerator(qemu: Path, *, remember: bool = True) -> AcceleratorChoice:
    """The accelerator that works on this host with this QEMU.

    Args:
        qemu: the QEMU program that will run the machine.
        remember: read and write the cached answer; ``doctor`` probes anew.
    """
    if not KVM.exists():
        return AcceleratorChoice(accelerator="tcg", reason="there is no /dev/kvm")
    if not os.access(KVM, os.R_OK | os.W_OK):
        return AcceleratorChoice(
            accelerator="tcg", reason="/dev/kvm is not accessible to this user"
        )
    answer_file = cache_directory() / f"accelerator-{_host_key(qemu)}.json"
    if remember and (known := _read_answer(answer_file)):
        return known
    choice = _try_kvm(qemu)
    log.info("using %s: %s", choice.accelerator, choice.reason)
    if remember:  # a trial is not to hide what a real machine has shown meanwhile
        _remember(answer_file, choice)
    return choice


def forget_kvm(qemu: Path, reason: str) -> AcceleratorChoice:
    """TCG, remembered from now on: KVM passed the probe and then failed a real machine."""
    choice = AcceleratorChoice(accelerator="tcg", reason=reason)
    log.warning("KVM failed, using TCG from now on: %s", reason)
    _remember(cache_directory() / f"accelerator-{_host_key(qemu)}.json", choice)
    return choice


def _host_key(qemu: Path) -> str:
    """What the answer depends on: this boot of the host, its kernel, this QEMU, this user."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = "unknown"
    status = qemu.stat()
    facts = (boot, os.uname().release, os.geteuid(), qemu, status.st_size, status.st_mtime_ns)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _read_answer(answer_file: Path) -> AcceleratorChoice | None:
    try:
        answer = json.loads(answer_file.read_text(encoding="utf-8"))
        accelerator, reason = answer["accelerator"], str(answer["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if accelerator not in ("kvm", "tcg"):
        return None
    return AcceleratorChoice(accelerator=accelerator, reason=reason)


def _remember(answer_file: Path, choice: AcceleratorChoice) -> None:
    content = json.dumps({"accelerator": choice.accelerator, "reason": choice.reason})
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a probe, no more
        write_atomically(answer_file, content.encode())


def _try_kvm(qemu: Path) -> AcceleratorChoice:
    try:
        with tempfile.TemporaryDirectory(prefix="vmprovision-kvm-") as folder:
            works, cause = _run_trial(qemu, Path(folder))
    except (OSError, subprocess.TimeoutExpired) as exc:
        works, cause = False, str(exc)
    if works:
        return AcceleratorChoice(accelerator="kvm", reason="a trial machine ran on /dev/kvm")
    return AcceleratorChoice(accelerator="tcg", reason=f"a trial of KVM failed: {cause}")


def _run_trial(qemu: Path, folder: Path) -> tuple[bool, str]:
    """Whether a machine ran on KVM, and what QEMU said if it did not."""
    argv = [str(qemu), "-accel", "kvm", "-cpu", "host", "-m", "32", "-nodefaults"]
    argv += ["-no-user-config", "-display", "none", "-qmp", "stdio"]
    is_pc = qemu.name.endswith(("x86_64", "i386", "qemu-kvm", "kvm"))
    if is_pc and os.uname().machine in ("x86_64", "i686"):
        firmware = folder / "firmware"
        firmware.write_bytes(bytes(FIRMWARE_SIZE - len(RESET_CODE)) + RESET_CODE)
        argv += ["-bios", str(firmware), "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        talk, wanted = "", TRIAL_STATUS
    else:
        argv += ["-machine", "virt"] if os.uname().machine in VIRT_MACHINES else []
        talk, wanted = PROBE_TALK, 0
    done = subprocess.run(  # noqa: S603 -- an argument list, never a shell
        argv,
        input=talk,
        capture_output=True,
        check=False,
        encoding="utf-8",
        errors="replace",
        timeout=PROBE_SECONDS,
    )
    words = done.stderr.strip().splitlines()
    cause = words[0] if words else f"QEMU ended with status {done.returncode}"
    return done.returncode == wanted and (bool(wanted) or '"running": true' in done.stdout), cause
