"""Guests of other architectures, built, injected and booted on QEMU's boards for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.conftest import require
from vmprovision.errors import BundledRuntimeError, ProofError, RecipeError
from vmprovision.progress import Control
from vmprovision.proof.machine import HARDWARE
from vmprovision.proof.machine.options import find_qemu
from vmprovision.recipe import build_image, find_recipe
from vmprovision.recipe.emulation import require_emulation
from vmprovision.runtime.build import build_runtimes

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 600.0

SLOW = pytest.mark.slow


@pytest.mark.boot
@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("busybox-arm64", "aarch64"),
        pytest.param("busybox-riscv64", "riscv64", marks=SLOW),
        pytest.param("busybox-armhf", "armv7l", marks=SLOW),
        pytest.param("busybox-i386", "i386", marks=SLOW),
        pytest.param("busybox-ppc64el", "ppc64le", marks=SLOW),
        pytest.param("busybox-s390x", "s390x", marks=SLOW),
    ],
)
def test_the_runtime_is_booted_on_another_architecture(
    name: str, arch: str, tmp_path: Path
) -> None:
    """A guest without Python runs the agent on the bundled runtime of its architecture."""
    try:
        find_qemu(arch, HARDWARE[arch])
        require_emulation(find_recipe(name).architecture)
        build_runtimes([arch], control=Control())
    except (ProofError, RecipeError, BundledRuntimeError) as exc:
        require(condition=False, reason=f"{exc.message}: {exc.hint}")
    disk = build_image(name, output=tmp_path / "guest.qcow2", control=Control())
    assert vmprovision.inject(disk).guest.arch == arch
    report = vmprovision.prove(disk, vmprovision.ProofOptions(timeout=SECONDS))
    assert report.information["runtime"].startswith("MicroPython")
    assert report.booted_by.startswith("own kernel")
    assert len(report.checks) == 5


@pytest.mark.parametrize("arch", sorted(HARDWARE))
def test_an_absent_qemu_is_named_with_its_package(
    arch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error says which of Debian's packages has the program."""
    monkeypatch.setenv("PATH", str(tmp_path))
    hardware = replace(HARDWARE[arch], programs=HARDWARE[arch].programs[:1])
    with pytest.raises(ProofError, match="is not installed") as caught:
        find_qemu(arch, hardware)
    assert hardware.package in caught.value.hint
