"""The proof by a boot: real guests, injected and started."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

import vmprovision
from vmprovision.appliance.filesystem import ApplianceFilesystem
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.filesystem.protocol import Attributes
from vmprovision.progress import Control
from vmprovision.recipe import build_image

if TYPE_CHECKING:
    from tests.conftest import RunCli

pytestmark = [pytest.mark.appliance, pytest.mark.boot]

EXTLINUX = "/boot/extlinux/extlinux.conf"
# Which program this hands over to is seen only by running it.
SCRIPT = b'#!/bin/sh\nprogram=/bin/busybox\nexec "$program" init\n'
AGENT = PurePosixPath("/usr/local/bin/guest-agent")


def digest(path: Path) -> str:
    """Return SHA-256 of a file on the host."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    """Return a copy of the BusyBox image that the test may write to."""
    copy = tmp_path / "busybox.qcow2"
    build_image("busybox-standalone", output=copy, control=Control())
    copy.chmod(0o644)
    return copy


def test_a_systemd_guest_is_proven_by_its_own_boot_loader(
    run_cli: RunCli, fresh_debian: Path, tmp_path: Path
) -> None:
    """From inject to health, metrics, the IP report and the unit's control group."""
    token = tmp_path / "token"
    token.write_text("secret")
    run_cli("inject", fresh_debian, "--vm-id", "web-1", "--port", "81", "--token-file", token)
    before = digest(fresh_debian)
    report = json.loads(run_cli("prove", fresh_debian, "--json").stdout)
    assert report["booted_by"].startswith("boot loader")
    assert report["init"] == "systemd"
    assert report["info"]["init"]["cgroup"] == "/system.slice/guest-agent.service"
    assert report["info"]["vm_id"] == "web-1"
    assert report["guest_ip"] == "10.0.2.15"
    assert report["metrics"]["memory_total_kb"] > 100_000
    assert digest(fresh_debian) == before
    assert [path.name for path in tmp_path.iterdir() if "vmprovision" in path.name] == []


def test_a_busybox_guest_is_proven_by_its_own_kernel(busybox: Path) -> None:
    """Without a boot loader its kernel in /boot is used, and process 1 respawns the agent."""
    vmprovision.inject(busybox)
    report = vmprovision.prove(busybox)
    assert report.booted_by.startswith("own kernel")
    assert report.init == "busybox"
    assert report.information["init"]["parent"]["pid"] == 1


def test_a_sysv_guest_is_proven(tmp_path: Path) -> None:
    """The makefiles that startpar reads start the agent at boot."""
    disk = tmp_path / "guest.qcow2"
    build_image("debian-12-sysvinit", output=disk, control=Control())
    assert inject_and_prove(disk) == ("sysv", "sysvinit")


@pytest.mark.parametrize(
    ("init", "system", "pid1"),
    [
        ("/sbin/openrc-init", "openrc", "openrc-init"),
        pytest.param("/sbin/runit", "runit", "runit", marks=pytest.mark.slow),
        pytest.param("/usr/sbin/finit", "finit", "finit", marks=pytest.mark.slow),
    ],
)
def test_a_guest_with_several_inits_is_proven(
    tmp_path: Path, init: str, system: str, pid1: str
) -> None:
    """The one that the boot loader names gets the service, and starts the agent at boot."""
    disk = tmp_path / "guest.qcow2"
    build_image("debian-12-several-inits", output=disk, control=Control())
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda1", "/")
        configuration = appliance.call("read_file", EXTLINUX)
        named = configuration.replace(b" ro ", f" ro init={init} ".encode())
        appliance.call("write", EXTLINUX, named)
        appliance.call("umount_all")
    assert inject_and_prove(disk) == (system, pid1)


def inject_and_prove(disk: Path) -> tuple[str, str]:
    """Inject, prove by a boot, and return the init system and process 1."""
    verdict = vmprovision.inject(disk).guest.init
    assert verdict.confidence == "certain"
    report = vmprovision.prove(disk)
    # a process that is root's could say what process 1 is
    assert report.information["init"]["pid1_exe"] is None
    return report.init, verdict.pid1


def test_a_guest_without_a_kernel_is_proven_by_a_given_one(busybox: Path, tmp_path: Path) -> None:
    """--kernel and --initrd boot an image that has neither boot loader nor kernel."""
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    with open_appliance([Drive(path=busybox, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda", "/")
        names = appliance.call("ls", "/boot")
        for start, target in (("vmlinuz", kernel), ("initrd", initrd)):
            (name,) = [name for name in names if name.startswith(start)]
            appliance.call("download", f"/boot/{name}", str(target))
        appliance.call("rm_rf", "/boot")
        appliance.call("umount_all")
    vmprovision.inject(busybox)
    with pytest.raises(vmprovision.ProofError, match="kernel") as caught:
        vmprovision.prove(busybox)
    assert "--kernel" in caught.value.hint
    options = vmprovision.ProofOptions(kernel=kernel, initrd=initrd)
    assert vmprovision.prove(busybox, options).booted_by == "given kernel"


def test_an_rc_local_guest_keeps_its_agent(busybox: Path) -> None:
    """The loop in rc.local starts the agent on a guest that runs rc.local at boot."""
    with open_appliance([Drive(path=busybox, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda", "/")
        guest = ApplianceFilesystem(appliance)
        assert b"rc.local" in guest.read(PurePosixPath("/etc/rc"), limit=10_000)
        # a program that inspection does not know starts BusyBox's init
        guest.write(PurePosixPath("/sbin/init"), SCRIPT, Attributes(mode=0o755))
        guest.write(PurePosixPath("/etc/rc.local"), b"#!/bin/sh\nexit 0\n")
        appliance.call("umount_all")
    report = vmprovision.inject(busybox)
    assert str(report.guest.init.hook) == "/etc/rc.local"
    assert vmprovision.prove(busybox).information["init"]["parent"]["pid"] != 1


def test_a_guest_whose_agent_fails_is_not_proven(run_cli: RunCli, busybox: Path) -> None:
    """Exit code 70, the cause, and the console's last lines; the image as it was."""
    vmprovision.inject(busybox)
    with open_appliance([Drive(path=busybox, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda", "/")
        ApplianceFilesystem(appliance).write(AGENT, b"#!/bin/sh\nexit 1\n")
        appliance.call("umount_all")
    before = digest(busybox)
    done = run_cli("prove", busybox, "--timeout", "20", "--json", check=False)
    assert done.returncode == 70
    error = json.loads(done.stdout)["error"]
    assert "/health" in error["message"]
    assert error["console"]
    assert digest(busybox) == before


def test_a_guest_without_an_agent_is_told_to_inject_first(run_cli: RunCli, busybox: Path) -> None:
    """There is nothing to prove, and nothing is booted."""
    done = run_cli("prove", busybox, check=False)
    assert done.returncode == 40
    assert "inject it first" in done.stderr
