"""KVM where it truly works, else QEMU's own translator (TCG): found out by trying.

A ``/dev/kvm`` that exists proves nothing: nested machines and CI hosts often have
one that is broken.  ``trial`` boots a kernel on it; what comes of that is kept in
the cache.  A KVM that works or fails is not tried again until the host boots or
QEMU changes.  One that hangs is: the host may only have been overloaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vmprovision.host.cache import (
    cache_directory,
    locked,
    open_own,
    write_atomically,
)
from vmprovision.host.kernel import appliance_kernel
from vmprovision.qemu.trial import try_kvm

if TYPE_CHECKING:
    from vmprovision.qemu.trial import Verdict

log = logging.getLogger(__name__)

Accelerator = Literal["kvm", "tcg"]

KVM = Path("/dev/kvm")
HANG_SECONDS = 600.0  # how long a KVM that hangs is not tried again
VERDICTS: dict[str, Verdict] = {"works": "works", "fails": "fails", "hangs": "hangs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorChoice:
    """The accelerator to use and why.

    Attributes:
        accelerator: what QEMU is to be started with.
        reason: why, in words for a person.
        verdict: what is known of KVM; ``untried`` where it could not be tried.
        is_denied: whether KVM was not tried because this user may not open ``/dev/kvm``.
    """

    accelerator: Accelerator
    reason: str
    verdict: Verdict = "untried"
    is_denied: bool = False


def choose_accelerator(qemu: Path, *, remember: bool = True) -> AcceleratorChoice:
    """Return the accelerator that works on this host with this QEMU.

    Args:
        qemu: the QEMU program that will run the machine.
        remember: read and write the cached answer; ``doctor`` tries anew.
    """
    if not KVM.exists():
        return AcceleratorChoice(accelerator="tcg", reason="there is no /dev/kvm")
    if not os.access(KVM, os.R_OK | os.W_OK):
        return AcceleratorChoice(
            accelerator="tcg", reason="/dev/kvm is not accessible to this user", is_denied=True
        )
    if not remember:  # a trial is not to hide what a real machine has shown meanwhile
        return _try(qemu)
    answer_file = _answer_file(qemu)
    if known := _read_answer(answer_file):
        return known
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs a trial, no more
            stack.enter_context(locked(answer_file.with_suffix(".lock"), lambda: None))
        if known := _read_answer(answer_file):  # of whoever held the lock
            return known
        choice = _try(qemu)
        log.info("using %s: %s", choice.accelerator, choice.reason)
        _remember(answer_file, choice)
    return choice


def distrust_kvm(qemu: Path, reason: str) -> None:
    """Use TCG for a while: KVM passed the trial, and then a real machine hung on it.

    Args:
        qemu: the QEMU program that ran the machine.
        reason: what was seen.
    """
    log.warning("KVM hangs, TCG is used for the next minutes: %s", reason)
    _remember(_answer_file(qemu), _choice("hangs", f"KVM hangs: {reason}"))


def _try(qemu: Path) -> AcceleratorChoice:
    kernel = appliance_kernel()
    if kernel is None:
        return AcceleratorChoice(
            accelerator="tcg", reason="KVM was not tried: no kernel in /boot can be read"
        )
    trial = try_kvm(qemu, kernel)
    seen = "was not tried" if trial.verdict == "untried" else trial.verdict
    return _choice(trial.verdict, f"KVM {seen}: {trial.cause}")


def _answer_file(qemu: Path) -> Path:
    """Return where the answer is kept for this boot of the host, its kernel, QEMU and user."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = "unknown"
    status = qemu.stat()
    facts = (boot, os.uname().release, os.geteuid(), qemu, status.st_size, status.st_mtime_ns)
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return cache_directory() / f"accelerator-{key}.json"


def _read_answer(answer_file: Path) -> AcceleratorChoice | None:
    """Return what is remembered, unless it is to be tried again."""
    try:
        with os.fdopen(open_own(answer_file, os.O_RDONLY), "rb") as file:
            answer: dict[str, Any] = json.load(file)
        verdict, reason = VERDICTS[answer["verdict"]], str(answer["reason"])
        age = time.time() - float(answer["seen"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if verdict == "hangs" and not 0 <= age < HANG_SECONDS:
        return None
    return _choice(verdict, reason)


def _choice(verdict: Verdict, reason: str) -> AcceleratorChoice:
    accelerator: Accelerator = "kvm" if verdict == "works" else "tcg"
    return AcceleratorChoice(accelerator=accelerator, reason=reason, verdict=verdict)


def _remember(answer_file: Path, choice: AcceleratorChoice) -> None:
    """Keep what was seen of KVM; a fault of the host is not."""
    if choice.verdict == "untried":
        return
    content = json.dumps({"verdict": choice.verdict, "reason": choice.reason, "seen": time.time()})
    with contextlib.suppress(OSError):  # see above
        write_atomically(answer_file, content.encode())
