"""KVM is used only if it boots a kernel."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from tests.kvm import broken_qemu
from vmprovision.host.kernel import appliance_kernel, host_kernels
from vmprovision.qemu import accelerator, trial
from vmprovision.qemu.accelerator import HANG_SECONDS, choose_accelerator, distrust_kvm

if TYPE_CHECKING:
    from collections.abc import Callable

LONG = 120.0  # enough on a loaded host


@pytest.fixture
def qemu_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that makes this host's QEMU with a KVM of the test's choice."""
    require(appliance_kernel(), "there is no kernel that can be read")
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(accelerator, "KVM", tmp_path)  # there, readable and writable
    monkeypatch.setattr(trial, "TRIAL_SECONDS", LONG)
    return lambda behaviour: broken_qemu(tmp_path / behaviour, behaviour)


@pytest.fixture
def short_trial(monkeypatch: pytest.MonkeyPatch, qemu_with: object) -> None:
    """A short trial, for a line that never comes."""
    assert qemu_with  # it sets a long one
    monkeypatch.setattr(trial, "TRIAL_SECONDS", 0.3)


def answer(tmp_path: Path) -> Path:
    """Return the file that remembers the result."""
    (path,) = (tmp_path / "cache").glob("accelerator-*.json")
    return path


def test_the_trial_sees_the_kernel_print(qemu_with: Callable[[str], Path], tmp_path: Path) -> None:
    """A KVM that works is used, and not tried again until QEMU changes."""
    qemu = qemu_with("works")
    choice = choose_accelerator(qemu)
    assert (choice.accelerator, choice.verdict) == ("kvm", "works"), choice
    before = answer(tmp_path).stat().st_mtime_ns
    assert choose_accelerator(qemu) == choice
    assert answer(tmp_path).stat().st_mtime_ns == before
    qemu.write_text(qemu.read_text().replace("    :\n", "    exit 3\n"))
    assert choose_accelerator(qemu).verdict == "fails"


@pytest.mark.usefixtures("short_trial")
@pytest.mark.parametrize("behaviour", ["hangs", "prints"])
def test_an_accelerator_that_hangs_gives_tcg_for_a_while(
    behaviour: str, qemu_with: Callable[[str], Path], tmp_path: Path
) -> None:
    """A machine whose kernel prints nothing hangs, whatever its firmware prints."""
    qemu = qemu_with(behaviour)
    choice = choose_accelerator(qemu)
    assert (choice.accelerator, choice.verdict) == ("tcg", "hangs")
    assert "printed nothing" in choice.reason
    begun = time.monotonic()
    assert choose_accelerator(qemu) == choice
    assert time.monotonic() - begun < trial.TRIAL_SECONDS
    assert not processes_with(str(tmp_path))
    file = answer(tmp_path)
    seen = json.loads(file.read_text())
    file.write_text(json.dumps({**seen, "seen": seen["seen"] - HANG_SECONDS, "reason": "old"}))
    assert choose_accelerator(qemu).reason == choice.reason


def processes_with(word: str) -> list[str]:
    """Return the command lines of running processes that contain a word."""
    done = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if word in line]


def test_an_accelerator_that_fails_gives_tcg_until_the_host_boots(
    qemu_with: Callable[[str], Path], tmp_path: Path
) -> None:
    """The reason is QEMU's own, and no time limit ends it."""
    qemu = qemu_with("fails")
    choice = choose_accelerator(qemu)
    assert (choice.accelerator, choice.verdict) == ("tcg", "fails")
    assert "failed to set MSR" in choice.reason
    file = answer(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), "seen": 0, "reason": "old"}))
    assert choose_accelerator(qemu).reason == "old"


def test_a_fault_of_the_host_is_not_blamed_on_kvm(
    qemu_with: Callable[[str], Path], tmp_path: Path
) -> None:
    """A QEMU that cannot set up any machine is reported as such, and not remembered."""
    qemu = qemu_with("works")
    script = qemu.read_text()
    qemu.write_text(script.replace("exec ", "echo cannot allocate memory >&2; exit 1; exec "))
    choice = choose_accelerator(qemu)
    assert (choice.accelerator, choice.verdict) == ("tcg", "untried")
    assert choice.reason == "KVM was not tried: cannot allocate memory"
    assert not list((tmp_path / "cache").glob("*.json"))
    qemu.write_bytes(b"\x7fELF")
    assert choose_accelerator(qemu).verdict == "untried"


def test_a_cache_that_cannot_be_written_is_not_blamed_on_kvm(
    qemu_with: Callable[[str], Path], tmp_path: Path
) -> None:
    """The trial needs no room, and its result counts even if it cannot be kept."""
    (tmp_path / "cache").write_bytes(b"")  # no directory can be made there
    choice = choose_accelerator(qemu_with("works"))
    assert (choice.accelerator, choice.verdict) == ("kvm", "works"), choice


def test_a_machine_that_hung_after_the_trial_is_remembered(
    qemu_with: Callable[[str], Path], tmp_path: Path
) -> None:
    """For ten minutes, whatever the trial showed."""
    qemu = qemu_with("works")
    assert choose_accelerator(qemu).accelerator == "kvm"
    distrust_kvm(qemu, "an appliance hung")
    assert choose_accelerator(qemu).verdict == "hangs"
    file = answer(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), "seen": 0}))
    assert choose_accelerator(qemu).accelerator == "kvm"


def test_the_kernel_is_the_newest_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels without modules cannot be used; SUPERMIN_KERNEL names one."""
    boot, modules = tmp_path / "boot", tmp_path / "modules"
    for version in ("6.9.0-1", "6.10.0-1", "6.10.0-2", "7.0"):
        boot.mkdir(exist_ok=True)
        (boot / f"vmlinuz-{version}").touch()
        if version != "7.0":
            (modules / version).mkdir(parents=True)
    monkeypatch.setattr("vmprovision.host.kernel.BOOT", boot)
    monkeypatch.setattr("vmprovision.host.kernel.MODULES", modules)
    monkeypatch.delenv("SUPERMIN_KERNEL", raising=False)
    names = [path.name for path in host_kernels()]
    assert names == ["vmlinuz-6.9.0-1", "vmlinuz-6.10.0-1", "vmlinuz-6.10.0-2"]
    assert appliance_kernel() == boot / "vmlinuz-6.10.0-2"
    if os.geteuid():  # root reads all
        (boot / "vmlinuz-6.10.0-2").chmod(0)
        assert appliance_kernel() == boot / "vmlinuz-6.10.0-1"
    monkeypatch.setenv("SUPERMIN_KERNEL", "/nowhere/vmlinuz")
    assert host_kernels() == [Path("/nowhere/vmlinuz")]
    assert appliance_kernel() is None
