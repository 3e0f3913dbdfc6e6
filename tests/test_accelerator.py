"""KVM is used where it truly runs a machine, and nowhere else."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require
from vmprovision.appliance import accelerator
from vmprovision.appliance.accelerator import choose_accelerator, forget_kvm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# The real QEMU on another accelerator than the one that it is asked for.
WRAPPER = """\
#!/bin/sh
echo run >> {log}
for word; do
  shift
  case $word in kvm) word={accelerator} ;; host) word=max ;; esac
  set -- "$@" "$word"
done
exec {qemu} "$@"
"""


@pytest.fixture
def qemu_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """This host's QEMU, which takes an accelerator of the test's choice for KVM."""
    real = shutil.which("qemu-system-x86_64")
    require(real, "qemu-system-x86_64 is not installed")
    monkeypatch.setenv("VMPROVISION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(accelerator, "KVM", tmp_path)  # there, readable and writable

    def wrap(name: str) -> Path:
        wrapper = tmp_path / "qemu-system-x86_64"
        wrapper.write_text(WRAPPER.format(log=tmp_path / "log", accelerator=name, qemu=real))
        wrapper.chmod(0o755)
        return wrapper

    return wrap


def test_the_trial_sees_an_instruction_run(qemu_on: Callable[[str], Path]) -> None:
    """On an accelerator that works the answer is yes."""
    assert choose_accelerator(qemu_on("tcg")).accelerator == "kvm"


def test_an_accelerator_that_fails_gives_tcg(qemu_on: Callable[[str], Path]) -> None:
    """The reason is what QEMU said."""
    choice = choose_accelerator(qemu_on("xen"))
    assert choice.accelerator == "tcg"
    assert "xen" in choice.reason


def test_the_answer_is_remembered_until_qemu_changes(
    qemu_on: Callable[[str], Path], tmp_path: Path
) -> None:
    """One trial serves all runs; a KVM that failed a real machine is remembered too."""
    qemu = qemu_on("tcg")
    assert [choose_accelerator(qemu).accelerator for _ in range(3)] == ["kvm"] * 3
    assert (tmp_path / "log").read_text() == "run\n"
    forget_kvm(qemu, "an appliance did not start")
    assert choose_accelerator(qemu).accelerator == "tcg"
    qemu.write_text(qemu.read_text() + "# newer\n")
    assert choose_accelerator(qemu).accelerator == "kvm"
