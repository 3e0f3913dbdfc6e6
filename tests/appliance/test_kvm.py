"""Appliances on a KVM that passes its trial and then hangs: TCG at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.kvm import broken_qemu
from vmprovision.appliance import stock
from vmprovision.appliance.drives import Drive
from vmprovision.appliance.session import launch, open_appliance
from vmprovision.appliance.snapshot import build, restore
from vmprovision.appliance.snapshot.host import host_appliance
from vmprovision.appliance.snapshot.store import SUSPECT
from vmprovision.host.cache import cache_directory
from vmprovision.progress import Control
from vmprovision.qemu import accelerator, trial
from vmprovision.qemu.accelerator import choose_accelerator

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.appliance, pytest.mark.slow]

SHORT = 2.0
LONG = 120.0
LIMITS = (
    (build, "KVM_BOOT_SECONDS"),
    (restore, "KVM_RESTORE_SECONDS"),
    (stock, "KVM_LAUNCH_SECONDS"),
)


@pytest.fixture
def qemu_whose_kvm(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Give a QEMU whose KVM works while there is a file ``mended`` beside it."""
    assert own_cache
    monkeypatch.setattr(accelerator, "KVM", tmp_path)  # there, readable and writable
    monkeypatch.setattr(trial, "TRIAL_SECONDS", LONG)
    for module, name in LIMITS:
        monkeypatch.setattr(module, name, LONG)

    def make(behaviour: str) -> Path:
        program = broken_qemu(tmp_path / "qemu", behaviour)
        (program.parent / "mended").touch()
        monkeypatch.setenv("LIBGUESTFS_HV", str(program))
        assert choose_accelerator(program).accelerator == "kvm"
        return program

    return make


@pytest.fixture
def disk(tmp_path: Path) -> Drive:
    """A small empty disk."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return Drive(path=path, format="raw")


def test_a_stock_appliance_and_one_to_be_saved_do_without_kvm_at_once(
    qemu_whose_kvm: Callable[[str], Path], disk: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for KVM once, and then the result is remembered."""
    qemu = qemu_whose_kvm("hangs")
    break_kvm(qemu, monkeypatch)
    saved = host_appliance(Control())
    assert saved is not None
    assert saved.accelerator == "tcg"
    assert choose_accelerator(qemu).verdict == "hangs"
    known = cache_directory().glob("accelerator-*.json")
    answer = max(known, key=lambda path: path.stat().st_mtime_ns)
    answer.write_text(answer.read_text().replace('"hangs"', '"works"'))
    assert choose_accelerator(qemu).accelerator == "kvm"
    with launch([disk], control=Control()) as appliance:
        assert appliance.has_volumes
    assert choose_accelerator(qemu).verdict == "hangs"


def test_an_appliance_that_does_not_run_again_on_kvm_is_restored_on_tcg(
    qemu_whose_kvm: Callable[[str], Path], disk: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was saved on KVM and restored there once; then KVM stalls, and TCG is remembered."""
    qemu = qemu_whose_kvm("stalls")
    saved = host_appliance(Control())
    assert saved is not None
    assert saved.accelerator == "kvm"
    with open_appliance([disk], control=Control()) as appliance:
        assert not appliance.has_volumes
    assert choose_accelerator(qemu).verdict == "works"
    break_kvm(qemu, monkeypatch)
    with open_appliance([disk], control=Control()) as appliance:
        assert not appliance.has_volumes, "this is a stock appliance"
        assert appliance.call("list_devices") == ["/dev/sda"]
    assert (saved.folder / SUSPECT).exists()
    choice = choose_accelerator(qemu)
    assert (choice.accelerator, choice.verdict) == ("tcg", "hangs")
    assert "did not finish restoring in time" in choice.reason


def break_kvm(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break KVM from now on, and wait for it no longer than needed."""
    (qemu.parent / "mended").unlink()
    for module, name in LIMITS:
        monkeypatch.setattr(module, name, SHORT)
