"""Every way in which disks lie: inject, inject again, remove, and nothing else changes."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.conftest import file_hash, state_of
from tests.image.layouts import GOOD, OWN_AGENT, OWN_RC_LOCAL
from tests.image.trees import differences, look_into
from vmprovision.changes.conditions import digest
from vmprovision.changes.operations import Remove
from vmprovision.runtime.archive import build_archive

if TYPE_CHECKING:
    from pathlib import Path

    from tests.image.layouts import Disks
    from tests.image.trees import Tree

pytestmark = pytest.mark.appliance

AGENT = "/usr/local/bin/guest-agent"
CONFIGURATION = "/etc/guest-agent.conf"
RECEIPT = "/usr/local/lib/guest-agent/receipt.json"
# Planned beforehand as well, which costs an appliance each.
PLANNED = ("in-the-way", "odd-links", "two-systems")


def source_of(disks: Disks, name: str) -> vmprovision.ImageOptions:
    """Return how a disk is opened: of two systems, the second."""
    root = "/dev/sda2" if name == "two-systems" else None
    return vmprovision.ImageOptions(format=disks.layouts[name].format, root=root)


def options_of(name: str, vm_id: str = "vm-1") -> vmprovision.InjectOptions:
    """Return the options of the injection."""
    init = "standalone" if name == "in-the-way" else None
    return vmprovision.InjectOptions(vm_id=vm_id, init=init)  # type: ignore[arg-type]  # one of its names


# What stands for the others in a default run; the rest is slow.
FIRST = ("btrfs", "gpt-split", "in-the-way", "lvm")


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in GOOD]
)
def test_injected_again_and_removed(name: str, disks: Disks, tmp_path: Path) -> None:
    """The plan and nothing else changes, nothing the second time, and a removal leaves nothing."""
    folder = tmp_path / "images"
    folder.mkdir()
    path, source = disks.copy(name, folder), source_of(disks, name)
    plan = planned(path, name, source) if name in PLANNED else None
    report = vmprovision.inject(path, options_of(name), source=source)
    assert list(folder.iterdir()) == [path]
    tree = look_into(disks.sight(name, path), tmp_path)
    check_injection(report, plan, disks.tree(name), tree)
    if name == "btrfs":
        check_subvolume(report)

    before = state_of(path)
    again = vmprovision.inject(path, options_of(name), source=source)
    assert again.changed == ()
    assert state_of(path) == before, "not the same file, byte for byte, its time included"

    vmprovision.remove(path, source=source)
    assert differences(disks.tree(name), look_into(disks.sight(name, path), tmp_path)) == {}


def planned(path: Path, name: str, source: vmprovision.ImageOptions) -> vmprovision.PlanReport:
    """Return the plan, whose making leaves the image alone."""
    before = file_hash(path)
    plan = vmprovision.plan(path, options_of(name), source=source)
    assert file_hash(path) == before, "plan wrote"
    return plan


def check_injection(
    report: vmprovision.ChangeReport,
    plan: vmprovision.PlanReport | None,
    before: Tree,
    after: Tree,
) -> None:
    """Check that the whole tree differs in the plan's paths only, and that root owns the agent.

    The agent has the archive's content, and everybody can execute it.
    """
    changed = set(differences(before, after))
    assert changed == {str(path) for path in report.changed}
    if plan:
        todo = [planned.operation for planned in plan.operations if not planned.satisfied]
        assert changed == {str(o.path) for o in todo if not isinstance(o, Remove)}
    (path,) = (path for path in changed if path.endswith("/bin/guest-agent"))
    agent = after[path]
    assert (agent.kind, agent.mode, agent.uid, agent.gid) == ("0", 0o755, 0, 0)
    assert agent.content == build_archive().sha256


def check_subvolume(report: vmprovision.ChangeReport) -> None:
    """Check that of the old root, the new one and a snapshot, the one that boots has the agent."""
    # libguestfs gives subvolumes the kernel's name of their disk, which need not be sda
    assert re.fullmatch(r"btrfsvol:/dev/sd[ab]1/@", report.guest.mountpoints["/"])


def test_what_stood_in_the_way_is_set_aside(disks: Disks) -> None:
    """The disk of that name really holds what the removal is to bring back."""
    tree = disks.tree("in-the-way")
    agent, rc_local = tree[AGENT], tree["/etc/rc.local"]
    assert (agent.content, agent.mode, agent.uid) == (digest(OWN_AGENT), 0o711, 1234)
    assert (rc_local.content, rc_local.mode, rc_local.uid) == (digest(OWN_RC_LOCAL), 0o640, 77)
    configuration = tree[CONFIGURATION]
    assert (configuration.kind, configuration.content) == ("2", "../opt/own.conf")
    assert (configuration.uid, configuration.gid) == (12, 34)


def test_another_vm_id_changes_the_configuration_only(disks: Disks, tmp_path: Path) -> None:
    """A run with another --vm-id touches the configuration and the receipt; verify agrees."""
    path = disks.copy("in-the-way", tmp_path)
    source = source_of(disks, "in-the-way")
    vmprovision.inject(path, options_of("in-the-way"), source=source)
    report = vmprovision.inject(path, options_of("in-the-way", "vm-2"), source=source)
    assert {str(changed) for changed in report.changed} == {CONFIGURATION, RECEIPT}
    verified = vmprovision.verify(path, source=source)
    assert verified.mismatches == ()
    assert verified.checked > 4


@pytest.mark.slow
@pytest.mark.parametrize("output", ["new.qcow2", "new.raw", "new.vmdk"])
def test_output_keeps_the_image(disks: Disks, tmp_path: Path, output: str) -> None:
    """--output writes a new image of the format that its name says and leaves the old one alone."""
    path = disks.copy("whole", tmp_path)
    before = file_hash(path)
    vmprovision.inject(path, options_of("whole"), output=tmp_path / output)
    assert file_hash(path) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([path.name, output])
    assert vmprovision.verify(tmp_path / output).mismatches == ()


@pytest.mark.slow
def test_image_with_a_backing_file(disks: Disks, tmp_path: Path) -> None:
    """Only the top of a chain is written to."""
    base = disks.copy("mbr-logical", tmp_path)
    base.chmod(0o444)
    top = tmp_path / "top.qcow2"
    create: list[str | Path] = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        base.name,
        top,
    ]
    subprocess.run(create, check=True)
    before = file_hash(base)
    vmprovision.inject(top, options_of("mbr-logical"))
    assert vmprovision.verify(top).mismatches == ()
    assert file_hash(base) == before
