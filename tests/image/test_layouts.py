"""Every way in which disks lie: inject, verify, inject again, remove, and nothing else changes."""

from __future__ import annotations

import concurrent.futures
import re
import subprocess
from dataclasses import dataclass
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
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from tests.image.layouts import Disks
    from tests.image.trees import Tree

pytestmark = pytest.mark.appliance

WORKERS = 2  # appliances side by side
AGENT = "/usr/local/bin/guest-agent"
CONFIGURATION = "/etc/guest-agent.conf"
RECEIPT = "/usr/local/lib/guest-agent/receipt.json"
# Planned beforehand as well, which costs an appliance each.
PLANNED = ("in-the-way", "odd-links", "two-systems")


@dataclass(frozen=True, slots=True, kw_only=True)
class Injected:
    """A disk with the agent in it, and what it took."""

    path: Path
    plan: vmprovision.PlanReport | None
    report: vmprovision.ChangeReport


def source_of(disks: Disks, name: str) -> vmprovision.ImageOptions:
    """Return how a disk is opened: of two systems, the second."""
    root = "/dev/sda2" if name == "two-systems" else None
    return vmprovision.ImageOptions(format=disks.layouts[name].format, root=root)


def options_of(name: str, vm_id: str = "vm-1") -> vmprovision.InjectOptions:
    """Return the options of the injection."""
    init = "standalone" if name == "in-the-way" else None
    return vmprovision.InjectOptions(vm_id=vm_id, init=init)  # type: ignore[arg-type]  # one of its names


def in_parallel(names: Iterable[str], job: Callable[[str], object]) -> dict[str, object]:
    """Run the job for each name, two at a time; return results, or exceptions in their place."""

    def guarded(name: str) -> object:
        try:
            return job(name)
        except vmprovision.VmprovisionError as exc:
            return exc

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        return dict(zip(names, pool.map(guarded, names), strict=True))


@pytest.fixture(scope="session")
def names(request: pytest.FixtureRequest) -> list[str]:
    """Return the disks that the tests of this run ask for."""
    found = {
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and {"injected", "name"} <= set(item.fixturenames)
    }
    return sorted(found | {"btrfs"})


@pytest.fixture(scope="session")
def injected(
    disks: Disks, names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """Inject into every disk, each in a folder of its own."""

    def work(name: str) -> Injected:
        path = disks.copy(name, tmp_path_factory.mktemp(name))
        source = source_of(disks, name)
        before = file_hash(path)
        plan = None
        if name in PLANNED:
            plan = vmprovision.plan(path, options_of(name), source=source)
        assert file_hash(path) == before, "plan wrote"
        report = vmprovision.inject(path, options_of(name), source=source)
        return Injected(path=path, plan=plan, report=report)

    return in_parallel(names, work)


def the(name: str, found: dict[str, object]) -> Injected:
    """Return the disk of this name; raise what made it fail."""
    result = found[name]
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, Injected)
    return result


@pytest.fixture(scope="session")
def trees_after_injection(
    disks: Disks, injected: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tree]:
    """Return what every disk holds after the injection, read in one appliance."""
    good = {name: disk for name, disk in injected.items() if isinstance(disk, Injected)}
    sights = {name: disks.sight(name, disk.path) for name, disk in good.items()}
    return look_into(sights, tmp_path_factory.mktemp("trees"))


@pytest.fixture(scope="session")
def injected_again(
    disks: Disks, injected: dict[str, object], trees_after_injection: dict[str, Tree]
) -> dict[str, object]:
    """Inject the same again; return whether every disk stays the same, byte for byte."""
    assert trees_after_injection

    def work(name: str) -> tuple[vmprovision.ChangeReport, bool]:
        disk = the(name, injected)
        before = state_of(disk.path)
        report = vmprovision.inject(disk.path, options_of(name), source=source_of(disks, name))
        return report, state_of(disk.path) == before

    return in_parallel(injected, work)


@pytest.fixture(scope="session")
def trees_after_removal(
    disks: Disks,
    injected: dict[str, object],
    injected_again: dict[str, object],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Tree]:
    """Return what every disk holds after the agent was removed."""
    assert injected_again

    def work(name: str) -> vmprovision.ChangeReport:
        return vmprovision.remove(the(name, injected).path, source=source_of(disks, name))

    removed = in_parallel(injected, work)
    sights = {
        name: disks.sight(name, the(name, injected).path)
        for name, report in removed.items()
        if isinstance(report, vmprovision.ChangeReport)
    }
    return look_into(sights, tmp_path_factory.mktemp("trees"))


# What stands for the others in a default run; the rest is slow.
FIRST = ("btrfs", "gpt-split", "in-the-way", "lvm")
EVERY = pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in GOOD]
)


@EVERY
def test_injection_changes_exactly_the_plan(
    name: str,
    disks: Disks,
    injected: dict[str, object],
    trees_after_injection: dict[str, Tree],
) -> None:
    """The whole tree differs from before in the plan's paths and in no other."""
    disk = the(name, injected)
    changed = set(differences(disks.tree(name), trees_after_injection[name]))
    assert changed == {str(path) for path in disk.report.changed}
    if disk.plan:
        todo = [planned.operation for planned in disk.plan.operations if not planned.satisfied]
        assert changed == {str(o.path) for o in todo if not isinstance(o, Remove)}
    assert [path.name for path in disk.path.parent.iterdir()] == [disk.path.name]


@EVERY
def test_agent_can_be_executed(
    name: str, injected: dict[str, object], trees_after_injection: dict[str, Tree]
) -> None:
    """The agent is a file of root's, with the archive's content, that everybody can execute."""
    changed = [str(path) for path in the(name, injected).report.changed]
    (path,) = (path for path in changed if path.endswith("/bin/guest-agent"))
    agent = trees_after_injection[name][path]
    assert (agent.kind, agent.mode, agent.uid, agent.gid) == ("0", 0o755, 0, 0)
    assert agent.content == build_archive().sha256


def test_btrfs_root_is_the_one_that_fstab_names(injected: dict[str, object]) -> None:
    """Of the old root, the new one and a snapshot, the subvolume that boots gets the agent."""
    mountpoints = the("btrfs", injected).report.guest.mountpoints
    # libguestfs gives subvolumes the kernel's name of their disk, which need not be sda
    assert re.fullmatch(r"btrfsvol:/dev/sd[ab]1/@", mountpoints["/"])


@EVERY
def test_second_injection_writes_nothing(name: str, injected_again: dict[str, object]) -> None:
    """Injecting what is there already leaves the image file identical, its time included."""
    result = injected_again[name]
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, tuple)
    report, same = result
    assert report.changed == ()
    assert same


@EVERY
def test_removal_leaves_nothing(
    name: str, disks: Disks, trees_after_removal: dict[str, Tree]
) -> None:
    """After a removal the whole tree is as it was: content, mode, owner, links, attributes."""
    assert differences(disks.tree(name), trees_after_removal[name]) == {}


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
