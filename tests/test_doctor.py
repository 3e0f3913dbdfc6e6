"""The doctor finds each fault of a host and names the command that fixes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import require
from tests.kvm import broken_qemu
from vmprovision import doctor
from vmprovision.doctor import Finding, examine_host
from vmprovision.host.cache import CACHE_VARIABLE
from vmprovision.host.kernel import appliance_kernel
from vmprovision.qemu import accelerator, trial
from vmprovision.qemu.accelerator import AcceleratorChoice

if TYPE_CHECKING:
    from pathlib import Path


def found(subject: str) -> Finding:
    """Return the finding about a subject."""
    (finding,) = (finding for finding in examine_host() if finding.subject.startswith(subject))
    return finding


@pytest.mark.parametrize("behaviour", ["hangs", "fails"])
def test_which_fault_kvm_has(
    behaviour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A KVM that hangs and one that fails are distinguished."""
    require(appliance_kernel(), "there is no kernel that can be read")
    monkeypatch.setattr(accelerator, "KVM", tmp_path)  # there, readable and writable
    monkeypatch.setattr(trial, "TRIAL_SECONDS", 0.3 if behaviour == "hangs" else 120.0)
    monkeypatch.setenv("LIBGUESTFS_HV", str(broken_qemu(tmp_path, behaviour)))
    finding = found("KVM")
    assert not finding.ok
    assert not finding.needed
    assert finding.detail.startswith(f"KVM {behaviour}: ")
    assert "dmesg" in finding.fix


def test_a_kvm_that_this_user_may_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command adds the user to the group kvm; root may open every device."""
    if os.geteuid() == 0:
        choice = AcceleratorChoice(accelerator="tcg", reason="", is_denied=True)
        assert "adduser" in doctor._kvm_command(choice)  # noqa: SLF001 -- as a user meets it
        return
    device = tmp_path / "kvm"
    device.touch(mode=0)
    monkeypatch.setattr(accelerator, "KVM", device)
    assert "adduser" in found("KVM").fix


def test_a_cache_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that others can write to is a fault, because its content is run."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    tmp_path.chmod(0o770)
    finding = found("cache")
    assert (finding.ok, finding.fix) == (False, f"chmod go-w {tmp_path}")
    subprocess.run(finding.fix, shell=True, check=True)  # noqa: S602 -- our own command
    assert found("cache").ok
    if os.geteuid() == 0:
        os.chown(tmp_path, 65534, 65534)
        assert "chown" in found("cache").fix


def test_a_host_without_a_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command also installs the compiler if it is missing."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert found("runtime").fix.endswith("vmprovision runtime build x86_64")
    appliance = found("saved appliance")
    assert (appliance.ok, appliance.fix) == (False, "vmprovision runtime build x86_64")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr("vmprovision.runtime.build._find_zig", lambda: None)
    assert "musl" in doctor._runtime().fix  # noqa: SLF001 -- the others need programs


def test_a_kernel_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreadable kernel and a SUPERMIN_KERNEL that does not exist have different fixes."""
    monkeypatch.setenv("SUPERMIN_KERNEL", str(tmp_path / "vmlinuz"))
    assert found("kernel").fix == "unset SUPERMIN_KERNEL"
    (tmp_path / "vmlinuz").touch(mode=0)
    if os.geteuid():  # root reads all
        assert found("kernel").fix == f"sudo chmod 0644 {tmp_path / 'vmlinuz'}"


def test_a_full_cache_and_a_small_temporary_directory(tmp_path: Path) -> None:
    """Each fault is reported as what it is, and nothing else is blamed for it."""
    namespace = ["unshare", "--mount", "--propagation", "private"]
    if os.geteuid():
        namespace.append("--map-root-user")
    is_allowed = subprocess.run([*namespace, "true"], check=False, capture_output=True)
    require(is_allowed.returncode == 0, "no mount namespace can be made here")
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    for folder in (cache, temporary):
        folder.mkdir()
    mounts = (
        'for folder in "$1" "$2"; do mount -t tmpfs -o size=64k,mode=0700 tmpfs "$folder"; done'
    )
    fill = 'head -c 1M /dev/zero >"$1/filler" 2>/dev/null; shift 2'
    command = ["sh", "-c", f'{mounts}; {fill}; exec "$@"', "sh", str(cache), str(temporary)]
    done = subprocess.run(
        [*namespace, *command, sys.executable, "-m", "vmprovision", "doctor", "--json"],
        env={**os.environ, "TMPDIR": str(temporary), CACHE_VARIABLE: str(cache)},
        capture_output=True,
        check=False,
        text=True,
    )
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    by_subject = {finding["subject"]: finding for finding in findings}
    assert "0 MiB free" in by_subject[f"cache in {cache}"]["detail"]
    assert by_subject[f"temporary files in {temporary}"]["mend"] == "export TMPDIR=/var/tmp"
    kvm = by_subject["KVM"]
    assert kvm["ok"] or "space" not in kvm["detail"], kvm
