"""A receipt is a claim: whatever a guest writes into it, root does nothing dangerous."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import vmprovision
from tests.conftest import require_root
from tests.trees import SYSTEMD_TREE, make_tree, tree_state
from vmprovision.errors import InspectionError, PlanError, VmprovisionError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RECEIPT = "usr/local/lib/guest-agent/receipt.json"
SET_ASIDE = "/usr/local/lib/guest-agent/set-aside"
EVIL = b"#!/bin/sh\nid\n"
EVIL_HASH = hashlib.sha256(EVIL).hexdigest()
SOMEBODY = 4711


def _forge(root: Path, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 -- JSON's own
    """Put a false receipt into a tree: its one file claims to replace an attacker's."""
    entry: dict[str, Any] = {
        "path": "/usr/local/bin/guest-agent",
        "kind": "file",
        "before": {
            "kind": "file",
            "mode": "6755",
            "uid": 0,
            "gid": 0,
            "sha256": EVIL_HASH,
            "kept": f"{SET_ASIDE}/{EVIL_HASH}",
        },
    }
    before = {**entry["before"], **changes.pop("before", {})}
    entry = {**entry, **changes, "before": before}
    document = {"schema": 1, "agent_version": "0.1.0", "init": "systemd", "entries": [entry]}
    make_tree(
        root,
        {
            **SYSTEMD_TREE,
            f"/{RECEIPT}": json.dumps(document),
            f"{SET_ASIDE}/{EVIL_HASH}": EVIL,
            "/usr/local/bin/guest-agent": "ours, it says",
            "/etc/shadow": "root:secret",
        },
    )
    return document


def _give_to(root: Path, owner: int) -> None:
    for path in (root, *root.rglob("*")):
        os.chown(path, owner, owner, follow_symlinks=False)


def test_no_bit_that_grants_rights_comes_from_a_receipt(tmp_path: Path) -> None:
    """A set-user-ID bit in a receipt is dropped, even in a tree that belongs to root."""
    _forge(tmp_path)
    vmprovision.remove(tmp_path)
    made = tmp_path / "usr/local/bin/guest-agent"
    assert made.read_bytes() == EVIL
    assert stat.S_IMODE(made.stat().st_mode) == 0o755


def test_what_a_stranger_s_receipt_brings_back_is_the_stranger_s(tmp_path: Path) -> None:
    """Files that root restores in another user's tree belong to that user."""
    require_root()
    _forge(tmp_path)
    _give_to(tmp_path, SOMEBODY)
    report = vmprovision.remove(tmp_path)
    assert [note for note in report.notes if f"{SOMEBODY}:{SOMEBODY}" in note]
    for path in tmp_path.rglob("*"):
        assert path.lstat().st_uid == SOMEBODY, path
        assert path.is_symlink() or not path.lstat().st_mode & 0o7000, path


def test_a_stranger_s_receipt_brings_nothing_into_roots_directory(tmp_path: Path) -> None:
    """The owner of only the receipt's directory cannot get a file into another directory."""
    require_root()
    _forge(tmp_path)
    for path in (tmp_path / RECEIPT, (tmp_path / RECEIPT).parent):
        os.chown(path, SOMEBODY, SOMEBODY)
    before = tree_state(tmp_path)
    for command in (vmprovision.remove, vmprovision.inject):
        with pytest.raises(PlanError, match="/usr/local/bin/guest-agent"):
            command(tmp_path)
    assert tree_state(tmp_path) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "/etc/passwd"},
        {"path": "/etc/cron.d/guest-agent"},
        {"path": "/usr/local/bin/other"},
        {"path": "/root/.ssh/authorized_keys"},
        {"path": "/etc/profile", "kind": "block", "name": "guest-agent"},
        {"path": "/etc/guest-agent.conf", "kind": "symlink", "target": "x"},
        {"path": f"{SET_ASIDE}/{'0' * 64}", "sha256": EVIL_HASH},
        {"path": "/.autorelabel", "kind": "request"},
        {"path": "/home", "kind": "directory", "before": {"kind": "absent"}},
        {"before": {"kept": "/etc/shadow"}},
        {"before": {"kept": f"{SET_ASIDE}/../receipt.json"}},
        {"before": {"kept": f"{SET_ASIDE}/other"}},
        {"before": {"kept": f"{SET_ASIDE}/{'0' * 64}"}},
        {"before": {"kept": f"/etc/{EVIL_HASH}"}},
        {"before": {"kind": "symlink"}},
        {"before": {"mode": "77777"}},
        {"before": {"uid": True}},
        {"before": {"uid": -1}},
        {"before": {"uid": (1 << 32) - 1}},
        {"before": {"label": "a" * 2000}},
        {"before": {"label": "\x1b[2J"}},
    ],
)
def test_what_no_injection_can_have_done_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Every reader of a receipt refuses an impossible entry, and nothing is changed."""
    _forge(tmp_path, **changes)
    before = tree_state(tmp_path)
    for command in (vmprovision.inspect, vmprovision.verify, vmprovision.remove):
        with pytest.raises(InspectionError, match=r"receipt\.json"):
            command(tmp_path)
    with pytest.raises(VmprovisionError, match=r"receipt\.json"):
        vmprovision.inject(tmp_path)
    assert tree_state(tmp_path) == before


DAMAGES: dict[str, Callable[[], bytes]] = {
    "half a surrogate pair in a path": lambda: _document('"/etc/\\ud800"'),
    "half a pair in a name": lambda: _document('"/etc/x", "name": "\\udfff"'),
    "no UTF-8": lambda: _document('"/etc/\xff"').replace(b"\xc3\xbf", b"\xff"),
    "UTF-16": lambda: _document('"/etc/x"').decode().encode("utf-16"),
    "deep lists": lambda: b"[" * 100_000,
    "deep objects": lambda: b'{"a":' * 100_000,
    "a long number": lambda: b'{"schema": ' + b"9" * 500_000 + b"}",
    "not a number": lambda: b'{"schema": NaN}',
    "endless": lambda: b'{"schema": 1e999}',
    "a fraction": lambda: b'{"schema": 1.0}',
    "truth": lambda: b'{"schema": true, "agent_version": "1", "init": "s6", "entries": []}',
    "a list": lambda: b"[]",
    "nothing": lambda: b"",
    "zeros": lambda: bytes(1000),
    "a field twice": lambda: b'{"schema": 1, "schema": 1}',
    "entries of text": lambda: b'{"schema": 1, "agent_version": "1", "init": "s", "entries": "x"}',
    "too large": lambda: b" " * (2 << 20),
    "too many": lambda: _document('"/etc/x"').replace(
        b"[", b"[" + b",".join([b"{}"] * 5000) + b","
    ),
}


def _document(path: str) -> bytes:
    entry = f'{{"path": {path}, "kind": "file", "before": {{"kind": "absent"}}}}'
    head = '"schema": 1, "agent_version": "1", "init": "s6"'
    return f'{{{head}, "entries": [{entry}]}}'.encode()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_receipt_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    """A damaged receipt gives one error with a next step, and no traceback."""
    make_tree(tmp_path, {**SYSTEMD_TREE, f"/{RECEIPT}": DAMAGES[damage]()})
    with pytest.raises(InspectionError, match=r"receipt\.json") as caught:
        vmprovision.inspect(tmp_path)
    assert caught.value.hint
    str(caught.value).encode()


@pytest.mark.parametrize("kind", ["directory", "symlink", "fifo"])
def test_a_receipt_that_is_no_file_is_an_error(tmp_path: Path, kind: str) -> None:
    """A receipt that is a link or a pipe is neither followed nor waited for."""
    make_tree(tmp_path, {**SYSTEMD_TREE, "/usr/local/lib/guest-agent": None})
    path = tmp_path / RECEIPT
    if kind == "directory":
        path.mkdir()
    elif kind == "symlink":
        path.symlink_to("/etc/os-release")
    else:
        os.mkfifo(path)
    with pytest.raises(InspectionError, match=r"receipt\.json"):
        vmprovision.inspect(tmp_path)


def test_a_huge_receipt_takes_little_memory(tmp_path: Path) -> None:
    """A huge receipt is refused unread, and the largest allowed one is parsed in little memory."""
    make_tree(tmp_path, {**SYSTEMD_TREE, "/usr/local/lib/guest-agent": None})
    for content in (b"[" + b"{}," * (21 << 20), b"[" + b"{}," * (340 << 10)):
        (tmp_path / RECEIPT).write_bytes(content)
        code = f"""
import vmprovision
try:
    vmprovision.inspect({str(tmp_path)!r})
except vmprovision.InspectionError:
    # not ru_maxrss, which a program inherits from who starts it
    status = open("/proc/self/status").read()
    print(status.partition("VmHWM:")[2].split()[0])
"""
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300
        )
        assert int(done.stdout) < 200 << 10, "KiB"


def test_a_path_of_many_components_ends(tmp_path: Path) -> None:
    """A receipt with a very long path is refused with one error."""
    _forge(tmp_path, path="/usr" + "/a" * 1900)
    with pytest.raises(InspectionError, match="no injection"):
        vmprovision.inspect(tmp_path)


def test_every_way_of_every_init_system_is_believed(tmp_path: Path) -> None:
    """An injection for any init system can be verified and removed, even behind links."""
    for number, (init, extra) in enumerate(
        [(name, {}) for name in ("systemd", "openrc", "sysv", "slackware", "upstart", "runit")]
        + [(name, {}) for name in ("dinit", "finit", "procd", "standalone")]
        + [
            ("busybox", {"/etc/inittab": "::sysinit:/etc/rc\n"}),
            ("s6", {"/etc/s6/rc.local": "#!/bin/sh\n"}),
            ("standalone", {"/opt/boot.sh": "#!/bin/sh\n"}),
        ]
    ):
        root = make_tree(tmp_path / str(number), {**SYSTEMD_TREE, **extra})
        if "/opt/boot.sh" in extra:
            (root / "etc/rc.local").symlink_to("/opt/boot.sh")
        before = tree_state(root)
        vmprovision.inject(root, vmprovision.InjectOptions(init=init))  # type: ignore[arg-type]  # one of them
        assert not vmprovision.verify(root).mismatches
        vmprovision.remove(root)
        assert tree_state(root) == before, init


def test_copies_that_are_huge_are_not_all_read(tmp_path: Path) -> None:
    """The copies that a receipt names are read within the budget of inspection."""
    vmprovision.inject(make_tree(tmp_path, SYSTEMD_TREE))
    document = json.loads((tmp_path / RECEIPT).read_text())
    (tmp_path / SET_ASIDE[1:]).mkdir(mode=0o700)
    for number in range(100):
        name = f"{number:064x}"
        document["entries"].append(
            {
                "path": f"{SET_ASIDE}/{name}",
                "kind": "file",
                "sha256": name,
                "before": {"kind": "absent"},
            }
        )
        with (tmp_path / SET_ASIDE[1:] / name).open("wb") as copy:
            copy.truncate(60 << 20)
    (tmp_path / RECEIPT).write_text(json.dumps(document))
    for command in (vmprovision.verify, vmprovision.remove):
        with pytest.raises(InspectionError, match="takes too much"):
            command(tmp_path)
