"""The receipt, and what ``remove`` and upgrade make of it, on a directory tree."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import (
    BUSYBOX_TREE,
    OS_RELEASE,
    SYSTEMD_TREE,
    Link,
    Tree,
    elf,
    make_tree,
    python_tree,
    tree_state,
)
from vmprovision.changes.receipt import parse_receipt, serialise_receipt
from vmprovision.errors import InspectionError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

RECEIPT = "usr/local/lib/guest-agent/receipt.json"
RC_LOCAL_TREE: Tree = {
    "/etc/os-release": OS_RELEASE,
    "/etc/rc.local": b"#!/bin/sh\necho hello\nexit 0",
    "/sbin/init": elf(content=b"nobody knows this program"),
    **python_tree(),
}


@pytest.mark.parametrize("tree", [SYSTEMD_TREE, BUSYBOX_TREE, RC_LOCAL_TREE])
def test_remove_brings_back_the_tree(tmp_path: Path, tree: Tree) -> None:
    """After inject and remove the tree is as it was, to byte, mode and owner."""
    make_tree(tmp_path, tree)
    before = tree_state(tmp_path)
    report = vmprovision.inject(tmp_path, vmprovision.InjectOptions(vm_id="a"))
    during = tree_state(tmp_path)
    touched = {
        path for path in before.keys() | during.keys() if before.get(path) != during.get(path)
    }
    assert touched == {str(path).lstrip("/") for path in report.changed}
    assert not vmprovision.verify(tmp_path).mismatches
    vmprovision.remove(tmp_path)
    assert tree_state(tmp_path) == before


def test_a_second_injection_changes_nothing(tmp_path: Path) -> None:
    """Nothing is written again, so not even a time changes."""
    make_tree(tmp_path, SYSTEMD_TREE)
    vmprovision.inject(tmp_path)
    times = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert vmprovision.inject(tmp_path).changed == ()
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_another_vm_id_changes_the_configuration_only(tmp_path: Path) -> None:
    """The receipt follows, as it holds the configuration's hash; nothing else changes."""
    make_tree(tmp_path, SYSTEMD_TREE)
    vmprovision.inject(tmp_path, vmprovision.InjectOptions(vm_id="a", port=9000))
    report = vmprovision.inject(tmp_path, vmprovision.InjectOptions(vm_id="b"))
    assert [str(path) for path in report.changed] == ["/etc/guest-agent.conf", f"/{RECEIPT}"]
    content = (tmp_path / "etc/guest-agent.conf").read_text()
    assert "VM_ID=b\n" in content
    assert "PORT=9000\n" in content


def test_what_stood_in_the_way_is_set_aside_and_comes_back(tmp_path: Path) -> None:
    """A foreign agent, a linked configuration and an edited rc.local survive a round trip."""
    make_tree(
        tmp_path,
        {
            **RC_LOCAL_TREE,
            "/usr/local/bin/guest-agent": b"\x00somebody else's\xff",
            "/etc/guest-agent.conf": Link("/srv/agent.conf"),
            "/srv/agent.conf": "VM_ID=theirs\n",
        },
    )
    (tmp_path / "usr/local/bin/guest-agent").chmod(0o4711)
    (tmp_path / "etc/rc.local").chmod(0o640)
    if os.geteuid() == 0:
        os.chown(tmp_path / "usr/local/bin/guest-agent", 12, 34)
        (tmp_path / "usr/local/bin/guest-agent").chmod(0o4711)
    before = tree_state(tmp_path)
    notes = vmprovision.inject(tmp_path).notes
    assert [note for note in notes if "/usr/local/bin/guest-agent has mode 4711" in note]
    assert (tmp_path / "srv/agent.conf").read_text() == "VM_ID=theirs\n"
    assert vmprovision.inject(tmp_path).changed == ()
    vmprovision.inject(tmp_path, vmprovision.InjectOptions(vm_id="b"))
    vmprovision.remove(tmp_path)
    (tmp_path / "usr/local/bin/guest-agent").chmod(0o4711)  # never by a receipt
    assert tree_state(tmp_path) == before


def test_lines_added_after_the_injection_stay(tmp_path: Path) -> None:
    """A person's later edit of rc.local is not undone with ours."""
    make_tree(tmp_path, RC_LOCAL_TREE)
    vmprovision.inject(tmp_path)
    script = tmp_path / "etc/rc.local"
    script.write_bytes(script.read_bytes().replace(b"echo hello", b"echo goodbye"))
    vmprovision.remove(tmp_path)
    assert script.read_bytes() == b"#!/bin/sh\necho goodbye\nexit 0"


def test_another_init_system_replaces_the_first_ones_files(tmp_path: Path) -> None:
    """Injecting with --init takes away what the earlier service had and keeps the set-aside."""
    make_tree(tmp_path, {**SYSTEMD_TREE, "/etc/rc.local": "#!/bin/sh\nexit 0\n"})
    before = tree_state(tmp_path)
    vmprovision.inject(tmp_path)
    vmprovision.inject(tmp_path, vmprovision.InjectOptions(init="standalone"))
    assert not (tmp_path / "etc/systemd/system/guest-agent.service").exists()
    assert b"guest-agent" in (tmp_path / "etc/rc.local").read_bytes()
    vmprovision.inject(tmp_path)
    assert b"guest-agent" not in (tmp_path / "etc/rc.local").read_bytes()
    vmprovision.remove(tmp_path)
    assert tree_state(tmp_path) == before


def test_a_newer_agent_upgrades_and_an_older_one_is_refused(tmp_path: Path) -> None:
    """Only the agent and the receipt change; going back is refused."""
    make_tree(tmp_path, SYSTEMD_TREE)
    vmprovision.inject(tmp_path, vmprovision.InjectOptions(vm_id="a"))
    current = json.loads((tmp_path / RECEIPT).read_text())["agent_version"]
    (tmp_path / "usr/local/bin/guest-agent").write_bytes(b"#!/bin/sh\n# older\n")
    _set_version(tmp_path, "0.0.9")
    report = vmprovision.inject(tmp_path)
    assert [path.name for path in report.changed] == ["guest-agent", "receipt.json"]
    assert vmprovision.verify(tmp_path).agent_version == current
    assert "VM_ID=a\n" in (tmp_path / "etc/guest-agent.conf").read_text()
    _set_version(tmp_path, "99.0.0")
    with pytest.raises(PlanError, match="newer"):
        vmprovision.inject(tmp_path)


def _set_version(tree: Path, version: str) -> None:
    document = json.loads((tree / RECEIPT).read_text())
    document["agent_version"] = version
    (tree / RECEIPT).write_text(json.dumps(document))


def test_verify_lists_every_mismatch(tmp_path: Path) -> None:
    """Content, mode, link and absence are all told, guest path first."""
    make_tree(tmp_path, SYSTEMD_TREE)
    vmprovision.inject(tmp_path)
    (tmp_path / "usr/local/bin/guest-agent").write_bytes(b"x")
    (tmp_path / "etc/guest-agent.conf").chmod(0o666)
    unit = tmp_path / "etc/systemd/system/guest-agent.service"
    unit.unlink()
    wanted = tmp_path / "etc/systemd/system/multi-user.target.wants/guest-agent.service"
    wanted.unlink()
    wanted.symlink_to("/dev/null")
    mismatches = vmprovision.verify(tmp_path).mismatches
    assert sorted(mismatch.split(":")[0] for mismatch in mismatches) == [
        "/etc/guest-agent.conf",
        "/etc/systemd/system/guest-agent.service",
        "/etc/systemd/system/multi-user.target.wants/guest-agent.service",
        "/usr/local/bin/guest-agent",
    ]


def test_injecting_again_mends_what_was_damaged(tmp_path: Path) -> None:
    """An injection brings every path back to its end condition."""
    make_tree(tmp_path, SYSTEMD_TREE)
    vmprovision.inject(tmp_path)
    (tmp_path / "usr/local/bin/guest-agent").write_bytes(b"x")
    report = vmprovision.inject(tmp_path)
    assert [str(path) for path in report.changed] == ["/usr/local/bin/guest-agent"]
    assert not vmprovision.verify(tmp_path).mismatches


def test_a_failed_injection_leaves_a_directory_as_it_was(tmp_path: Path) -> None:
    """A directory has no redo log, so what was written is taken back."""
    make_tree(
        tmp_path,
        {**SYSTEMD_TREE, "/etc/systemd/system/multi-user.target.wants/guest-agent.service/x": "y"},
    )
    before = tree_state(tmp_path)
    with pytest.raises(vmprovision.ApplyError, match=r"guest-agent\.service"):
        vmprovision.inject(tmp_path)
    assert tree_state(tmp_path) == before


def test_the_receipt_survives_its_own_file(tmp_path: Path) -> None:
    """A receipt survives a round trip, and has nothing that changes between runs."""
    make_tree(tmp_path, SYSTEMD_TREE)
    vmprovision.inject(tmp_path)
    content = (tmp_path / RECEIPT).read_bytes()
    assert serialise_receipt(parse_receipt(content)) == content


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("entries"),
        lambda d: d["entries"][0].update(path="relative"),
        lambda d: d["entries"][0].update(path="/etc/../../x"),
        lambda d: d["entries"][0].update(kind="device"),
        lambda d: d["entries"][0].update(before={}),
        lambda d: d.update(agent_version="\x1b[2J"),
        lambda d: d.update(entries=d["entries"] * 1000),
        lambda d: d.update(schema=99),
        lambda d: d.update(entries=[[[[]]]]),
    ],
)
def test_a_damaged_receipt_is_an_error_that_says_what_to_do(tmp_path: Path, damage: object) -> None:
    """A receipt comes from the guest: whatever is in it, the answer is one clear error."""
    make_tree(tmp_path, SYSTEMD_TREE)
    vmprovision.inject(tmp_path)
    receipt = tmp_path / RECEIPT
    document = json.loads(receipt.read_text())
    damage(document)  # type: ignore[operator]  # one of the functions above
    receipt.write_text(json.dumps(document))
    with pytest.raises(InspectionError, match=r"receipt\.json") as caught:
        vmprovision.inspect(tmp_path)
    assert caught.value.hint


def test_removing_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A guest without a receipt holds nothing that is known to be ours."""
    make_tree(tmp_path, SYSTEMD_TREE)
    for command in (vmprovision.remove, vmprovision.verify):
        with pytest.raises(PlanError, match="no injected agent"):
            command(tmp_path)


def test_every_path_of_the_plan_is_the_real_one(tmp_path: Path) -> None:
    """Where /usr/local is elsewhere, the receipt and what is set aside are there too."""
    make_tree(
        tmp_path,
        {
            **{name: what for name, what in SYSTEMD_TREE.items() if name != "/usr/local/bin"},
            "/usr/local": Link("../var/usrlocal"),
            "/var/usrlocal/bin/guest-agent": "somebody else's",
        },
    )
    before = tree_state(tmp_path)
    report = vmprovision.inject(tmp_path)
    assert not [path for path in report.changed if path.is_relative_to("/usr/local")]
    assert vmprovision.inject(tmp_path).changed == ()
    vmprovision.remove(tmp_path)
    assert tree_state(tmp_path) == before
