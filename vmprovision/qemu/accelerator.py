"""Choose KVM where it works, else QEMU's own translator (TCG).

A ``/dev/kvm`` that exists proves nothing: nested machines and CI hosts often have a
broken one. ``trial`` boots a kernel on it, and the cache keeps the result. A KVM that
works or fails is not tried again until the host boots or QEMU changes. A KVM that
hangs is tried again later: the host may only have been overloaded.
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
from typing import TYPE_CHECKING, Any, TypeVar

from vmprovision.errors import ApplianceError, ApplianceTimeoutError
from vmprovision.host.cache import (
    cache_directory,
    locked,
    open_own,
    write_atomically,
)
from vmprovision.host.kernel import appliance_kernel
from vmprovision.qemu.trial import try_kvm

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmprovision.qemu.options import Accelerator
    from vmprovision.qemu.trial import Verdict

log = logging.getLogger(__name__)

T = TypeVar("T")

KVM = Path("/dev/kvm")
HANG_SECONDS = 600.0  # a KVM that hangs is not tried again for so long
VERDICTS: dict[str, Verdict] = {"works": "works", "fails": "fails", "hangs": "hangs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorChoice:
    """The accelerator to use and why.

    Attributes:
        accelerator: the accelerator.
        reason: why, in words for a person.
        verdict: what is known of KVM; ``untried`` if it could not be tried.
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
        remember: read and write the cached result; ``doctor`` tries again instead.
    """
    if not KVM.exists():
        return AcceleratorChoice(accelerator="tcg", reason="/dev/kvm does not exist")
    if not os.access(KVM, os.R_OK | os.W_OK):
        return AcceleratorChoice(
            accelerator="tcg", reason="/dev/kvm is not accessible to this user", is_denied=True
        )
    if not remember:  # the cached result may come from a real machine, which proves more
        return _try(qemu)
    answer_file = _answer_file(qemu)
    if known := _read_answer(answer_file):
        return known
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without a cache only time is lost
            stack.enter_context(locked(answer_file.with_suffix(".lock"), lambda: None))
        if known := _read_answer(answer_file):  # the process that held the lock knows now
            return known
        choice = _try(qemu)
        log.info("using %s: %s", choice.accelerator, choice.reason)
        _remember(answer_file, choice)
    return choice


def distrust_kvm(qemu: Path, reason: str) -> None:
    """Use TCG for ten minutes: KVM passed its trial, and then a real machine hung on it.

    Args:
        qemu: the QEMU program that ran the machine.
        reason: what was seen.
    """
    log.warning("KVM hangs; using TCG for the next ten minutes: %s", reason)
    _remember(_answer_file(qemu), _choice("hangs", f"KVM hangs: {reason}"))


def run_accelerated(
    qemu: Path,
    attempt: Callable[[Accelerator], T],
    *,
    failure_of: Callable[[ApplianceError], ApplianceError | None] = lambda error: error,
) -> T:
    """Return what ``attempt`` returns on the chosen accelerator; if KVM fails, on TCG.

    KVM may pass its trial and still hang under a real machine. A missing file or a full
    disk fails on TCG as well, so KVM is blamed only after TCG has succeeded.

    Args:
        qemu: the QEMU program of the machine.
        attempt: starts a machine on an accelerator.
        failure_of: returns the failure of the machine behind an error, or None for an
            error that no other accelerator can avoid.

    Raises:
        ApplianceError: the attempt failed on TCG, or for another reason than KVM.
    """
    accelerator = choose_accelerator(qemu).accelerator
    try:
        return attempt(accelerator)
    except ApplianceError as exc:
        failure = failure_of(exc)
        if accelerator == "tcg" or failure is None:
            raise
    log.info("trying TCG: %s", failure.message)
    result = attempt("tcg")
    if isinstance(failure, ApplianceTimeoutError):
        distrust_kvm(qemu, failure.message)
    else:
        log.warning("a machine failed on KVM and works on TCG: %s", failure.message)
    return result


def _try(qemu: Path) -> AcceleratorChoice:
    kernel = appliance_kernel()
    if kernel is None:
        return AcceleratorChoice(
            accelerator="tcg", reason="KVM was not tried: no kernel in /boot is readable"
        )
    trial = try_kvm(qemu, kernel)
    seen = "was not tried" if trial.verdict == "untried" else trial.verdict
    return _choice(trial.verdict, f"KVM {seen}: {trial.cause}")


def _answer_file(qemu: Path) -> Path:
    """Return the cache file for this boot of the host, its kernel, QEMU and user."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = "unknown"
    status = qemu.stat()
    facts = (boot, os.uname().release, os.geteuid(), qemu, status.st_size, status.st_mtime_ns)
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return cache_directory() / f"accelerator-{key}.json"


def _read_answer(answer_file: Path) -> AcceleratorChoice | None:
    """Return the remembered choice; None if there is none or KVM is due for another trial."""
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
    """Keep what was seen of KVM; another fault of the host is not kept."""
    if choice.verdict == "untried":
        return
    content = json.dumps({"verdict": choice.verdict, "reason": choice.reason, "seen": time.time()})
    with contextlib.suppress(OSError):  # without a cache only time is lost
        write_atomically(answer_file, content.encode())
