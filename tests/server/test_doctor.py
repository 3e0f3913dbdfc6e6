"""What ``doctor --server`` says about a ``/dev/kvm`` that libvirt sees in two ways."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import require
from vmprovision.server import doctor

NOBODY = 65534
KVM = Path("/dev/kvm")


@pytest.mark.parametrize(("mode", "fix"), [(0o666, "sudo chmod 600"), (0o600, "")])
def test_a_device_without_kvm(
    mode: int, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's user must not be able to open it: libvirt then knows for good that there is no KVM."""
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(mode)
    monkeypatch.setattr(doctor, "KVM", device)
    (finding,) = doctor._kvm((os.geteuid() + 1, NOBODY))  # noqa: SLF001 -- as libvirt's user meets it
    assert finding.ok is not bool(fix)
    assert finding.fix.startswith(fix)
    assert not finding.needed


def test_a_kvm_that_qemu_may_not_open() -> None:
    """The command gives it to the group kvm; root may open every device."""
    try:
        works = doctor._has_kvm()  # noqa: SLF001 -- a PermissionError is no answer
    except PermissionError:
        works = False
    require(works, "no /dev/kvm answers here", optional=True)
    is_open = bool(KVM.stat().st_mode & 0o006)
    (other,) = doctor._kvm((NOBODY, NOBODY))  # noqa: SLF001 -- likewise
    assert other.ok is is_open
    assert ("chgrp kvm" in other.fix) is not is_open
    (root,) = doctor._kvm((0, 0))  # noqa: SLF001 -- likewise
    assert root.ok


def test_a_host_without_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to say about it."""
    monkeypatch.setattr(doctor, "KVM", tmp_path / "kvm")
    assert doctor._kvm((NOBODY, NOBODY)) == []  # noqa: SLF001 -- likewise
