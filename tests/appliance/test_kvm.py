"""Appliances on a KVM that passed its trial and hangs all the same: TCG at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.kvm import broken_qemu
from vmprovision.appliance import stock
from vmprovision.appliance.drives import Drive
from vmprovision.appliance.session import launch
from vmprovision.appliance.snapshot import build, restore
from vmprovision.appliance.snapshot.host import host_appliance
from vmprovision.host.cache import cache_directory
from vmprovision.progress import Control
from vmprovision.qemu import accelerator, trial
from vmprovision.qemu.accelerator import choose_accelerator

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.appliance

SHORT = 2.0
LONG = 120.0


@pytest.fixture
def qemu(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A QEMU whose KVM works while there is a file ``mended`` beside it, and else hangs."""
    assert own_cache
    monkeypatch.setattr(accelerator, "KVM", tmp_path)  # there, readable and writable
    monkeypatch.setattr(trial, "TRIAL_SECONDS", LONG)
    for module, name in ((build, "BOOT"), (restore, "RESTORE"), (stock, "LAUNCH")):
        monkeypatch.setattr(module, f"KVM_{name}_SECONDS", LONG)
    program = broken_qemu(tmp_path / "qemu", "hangs")
    (program.parent / "mended").touch()
    monkeypatch.setenv("LIBGUESTFS_HV", str(program))
    assert choose_accelerator(program).accelerator == "kvm"
    return program


@pytest.mark.slow
def test_a_stock_appliance_and_one_to_be_saved_do_without_kvm_at_once(
    qemu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for KVM once, and then what was seen is remembered."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    hang(qemu, monkeypatch)
    saved = host_appliance(Control())
    assert saved is not None
    assert saved.accelerator == "tcg"
    assert choose_accelerator(qemu).verdict == "hangs"
    (answer,) = (path for path in cache_directory().glob("accelerator-*.json"))
    answer.write_text(answer.read_text().replace('"hangs"', '"works"'))
    assert choose_accelerator(qemu).accelerator == "kvm"
    with launch([Drive(path=disk, format="raw")], control=Control()) as appliance:
        assert appliance.has_volumes
    assert choose_accelerator(qemu).verdict == "hangs"


def hang(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let KVM hang from now on, and wait for it no longer than needed."""
    (qemu.parent / "mended").unlink(missing_ok=True)
    for module, name in ((build, "BOOT"), (restore, "RESTORE"), (stock, "LAUNCH")):
        monkeypatch.setattr(module, f"KVM_{name}_SECONDS", SHORT)
