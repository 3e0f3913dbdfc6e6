"""Injecting into guests with a policy: which labels the files get, and what if they cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.conftest import require
from tests.trees import SYSTEMD_TREE, Tree, make_tree, tree_state
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.filesystem.protocol import SELINUX
from vmprovision.inspection.selinux import CONTEXTS_LIMIT, inspect_selinux
from vmprovision.selinux.filecontexts import LINE_LIMIT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.selinux.libselinux import LibSELinux
    from vmprovision.selinux.filecontexts import LabelledKind

CONFIG = "SELINUX=enforcing\nSELINUXTYPE=targeted\n"
RULES = "/etc/selinux/targeted/contexts/files/file_contexts"
# In the words of Red Hat's policy; its whole text is longer by six thousand lines.
TARGETED: Tree = {
    **SYSTEMD_TREE,
    "/etc/selinux/config": CONFIG,
    RULES: """\
/.*\tsystem_u:object_r:default_t:s0
/etc/.*\tsystem_u:object_r:etc_t:s0
/usr/.*\tsystem_u:object_r:usr_t:s0
/usr/(.*/)?lib(/.*)?\tsystem_u:object_r:lib_t:s0
/usr/(.*/)?bin(/.*)?\tsystem_u:object_r:bin_t:s0
/etc/rc\\.d/rc\\.local\t--\tsystem_u:object_r:initrc_exec_t:s0
/usr/lib/systemd/system(/.*)?\tsystem_u:object_r:systemd_unit_file_t:s0
/\t-d\tsystem_u:object_r:root_t:s0
""",
    f"{RULES}.subs_dist": "/etc/systemd/system /usr/lib/systemd/system\n/usr/local/lib /usr/lib\n",
}
EXPECTED = {
    "/etc/guest-agent.conf": "etc_t",
    "/etc/systemd/system-preset": "etc_t",
    "/etc/systemd/system-preset/00-guest-agent.preset": "etc_t",
    "/etc/systemd/system/guest-agent.service": "systemd_unit_file_t",
    "/etc/systemd/system/multi-user.target.wants/guest-agent.service": "systemd_unit_file_t",
    "/usr/local/bin/guest-agent": "bin_t",
    "/usr/local/lib": "lib_t",
    "/usr/local/lib/guest-agent": "lib_t",
    "/usr/local/lib/guest-agent/receipt.json": "lib_t",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a directory whose files can be given labels."""
    possible = LocalFilesystem(tmp_path).takes_labels()
    require(possible, "setting labels needs root with CAP_SYS_ADMIN")
    return tmp_path


def label_of(path: Path) -> str | None:
    """Return the label that a file of the host has."""
    try:
        return os.getxattr(path, SELINUX, follow_symlinks=False).rstrip(b"\0").decode()
    except OSError:
        return None


def set_label(path: Path, label: str) -> None:
    """Give a file of the host a label, as the guest's own tools would."""
    os.setxattr(path, SELINUX, label.encode() + b"\0", follow_symlinks=False)


def labels(root: Path) -> dict[str, str | None]:
    """Return every path in a tree with its label."""
    return {f"/{path.relative_to(root)}": label_of(path) for path in sorted(root.rglob("*"))}


def kind_of(path: Path) -> LabelledKind:
    """Return what kind of file of the host this is."""
    return "symlink" if path.is_symlink() else "directory" if path.is_dir() else "file"


def relabel(root: Path, rules: LibSELinux) -> None:
    """Do what a guest does when ``/.autorelabel`` is there: run setfiles(8), remove the file."""
    for path in root.rglob("*"):
        if label := rules.label_for(f"/{path.relative_to(root)}", kind_of(path)):
            set_label(path, label)
    (root / ".autorelabel").unlink(missing_ok=True)


def test_everything_that_is_made_gets_its_label(root: Path) -> None:
    """Files, links and new directories do; what was there keeps what it had."""
    make_tree(root, TARGETED)
    report = vmprovision.inject(root)
    assert report.notes == ()
    found = {path: label for path, label in labels(root).items() if label}
    assert found == {path: f"system_u:object_r:{name}:s0" for path, name in EXPECTED.items()}
    assert {str(path) for path in report.changed} == EXPECTED.keys()
    assert vmprovision.verify(root).mismatches == ()
    assert vmprovision.inject(root).changed == ()


@pytest.mark.parametrize("init", ["systemd", "openrc", "sysv", "runit", "standalone"])
def test_labels_are_those_of_a_real_policy(
    root: Path, policy_files: dict[str, bytes], real_rules: LibSELinux, init: str
) -> None:
    """Under Debian's policy every path that changes has the label that libselinux gives it."""
    make_tree(root, {**SYSTEMD_TREE, "/etc/rc.local": "#!/bin/sh\n", **policy_files})
    options = vmprovision.InjectOptions(init=init)  # type: ignore[arg-type]  # one of its names
    changed = vmprovision.inject(root, options).changed
    assert len(changed) > 4
    for path in changed:
        if str(path) != "/etc/rc.local":  # edited: it had none
            here = root / str(path)[1:]
            assert label_of(here) == real_rules.label_for(str(path), kind_of(here)), path


def test_removal_brings_the_labels_back(
    root: Path, policy_files: dict[str, bytes], real_rules: LibSELinux
) -> None:
    """Of files that were replaced or edited, too, odd ones of their owner's included."""
    make_tree(
        root,
        {
            **SYSTEMD_TREE,
            **policy_files,
            "/etc/rc.local": "#!/bin/sh\nexit 0\n",
            "/etc/guest-agent.conf": "theirs\n",
        },
    )
    relabel(root, real_rules)
    odd = "system_u:object_r:odd_t:s0:c1,c2"
    for name in ("etc/rc.local", "etc/guest-agent.conf"):
        set_label(root / name, odd)
    before, trees = labels(root), tree_state(root)
    vmprovision.inject(root, vmprovision.InjectOptions(init="standalone"))
    during = labels(root)
    assert during["/etc/rc.local"] == odd
    assert during["/etc/guest-agent.conf"] == "system_u:object_r:etc_t:s0"
    assert None not in during.values()
    vmprovision.remove(root)
    assert labels(root) == before
    assert tree_state(root) == trees


def test_a_label_that_was_changed_is_told_and_mended(root: Path) -> None:
    """For verify a wrong label is a mismatch, and injecting again mends files and directories."""
    make_tree(root, TARGETED)
    vmprovision.inject(root)
    os.removexattr(root / "usr/local/bin/guest-agent", SELINUX)
    set_label(root / "usr/local/lib/guest-agent", "u:r:tmp_t")
    assert sorted(vmprovision.verify(root).mismatches) == [
        "/usr/local/bin/guest-agent: label missing, should be system_u:object_r:bin_t:s0",
        "/usr/local/lib/guest-agent: label u:r:tmp_t, should be system_u:object_r:lib_t:s0",
    ]
    assert len(vmprovision.inject(root).changed) == 2
    assert vmprovision.verify(root).mismatches == ()


def test_a_disabled_guest_gets_labels_too(root: Path) -> None:
    """They do no harm, and are right on the day when SELinux is switched on."""
    make_tree(root, {**TARGETED, "/etc/selinux/config": "SELINUX=disabled\nSELINUXTYPE=targeted\n"})
    vmprovision.inject(root)
    assert label_of(root / "usr/local/bin/guest-agent") == "system_u:object_r:bin_t:s0"


HOSTILE = "/usr/local/" + "(((((x*)*)*)*)*)*" * 200 + ".*" * 500 + "\tu:r:t\n"
UNUSABLE: dict[str, Tree] = {
    "compiled rules only": {RULES: "", f"{RULES}.bin": b"\x8a\xff\x7c\xf9"},
    "no rules": {RULES: "# nothing\n"},
    "a damaged line": {RULES: "/.*\n"},
    "too large": {RULES: "#" * (CONTEXTS_LIMIT + 1)},
    "too many": {RULES: "/x\tu:r:t\n" * (LINE_LIMIT + 1)},
    "a pattern that we do not know": {RULES: "/usr/(?!x).*\tu:r:t\n"},
    "patterns that take for ever": {RULES: HOSTILE * 100},
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_guest_whose_rules_are_unusable_labels_its_files_itself(root: Path, name: str) -> None:
    """It is asked to once, the report says so and why, and removal takes the request back."""
    tree = {**TARGETED, **UNUSABLE[name]}
    if tree[RULES] == "":
        del tree[RULES]
    make_tree(root, tree)
    before = tree_state(root)
    report = vmprovision.inject(root)
    (note,) = report.notes
    assert "/.autorelabel" in note
    assert set(labels(root).values()) == {None}
    assert (root / ".autorelabel").read_bytes() == b""
    assert vmprovision.verify(root).mismatches == ()
    assert vmprovision.inject(root).changed == ()
    vmprovision.remove(root)
    assert tree_state(root) == before


@pytest.fixture
def unknown_pattern(root: Path, real_rules: LibSELinux) -> Path:
    """Inject a guest that can only be asked to relabel, and let it relabel as if it had booted."""
    make_tree(root, {**TARGETED, RULES: "/(?!x).*\tu:r:t\n"})
    vmprovision.inject(root)
    relabel(root, real_rules)
    return root


def test_a_guest_that_has_labelled_its_files_is_not_asked_again(unknown_pattern: Path) -> None:
    """Nothing is missing, nothing is to do, and what is written later keeps the path's label."""
    root = unknown_pattern
    assert vmprovision.verify(root).mismatches == ()
    assert vmprovision.inject(root).changed == ()
    before = labels(root)
    report = vmprovision.inject(root, vmprovision.InjectOptions(vm_id="other"))
    assert str(report.changed[0]) == "/etc/guest-agent.conf"
    assert report.notes == ()
    assert before["/etc/guest-agent.conf"]
    assert labels(root)["/etc/guest-agent.conf"] == before["/etc/guest-agent.conf"]
    assert not (root / ".autorelabel").exists()
    vmprovision.remove(root)
    assert not (root / "usr/local/bin/guest-agent").exists()


def test_a_request_of_somebody_else_stays(root: Path) -> None:
    """It is neither rewritten nor taken away: its content means something to fixfiles(8)."""
    make_tree(root, {**TARGETED, RULES: "/(?!x).*\tu:r:t\n", "/.autorelabel": "-F"})
    before = tree_state(root)
    report = vmprovision.inject(root)
    assert len(report.notes) == 1
    assert (root / ".autorelabel").read_text() == "-F"
    vmprovision.remove(root)
    assert tree_state(root) == before


def test_a_disabled_guest_is_asked_for_nothing(root: Path) -> None:
    """Enabling SELinux labels all files anyway."""
    config = "SELINUX=disabled\nSELINUXTYPE=targeted\n"
    make_tree(root, {**TARGETED, "/etc/selinux/config": config, RULES: "/.*\n"})
    assert vmprovision.inject(root).notes == ()
    assert not (root / ".autorelabel").exists()


def test_a_filesystem_without_labels(tmp_path: Path) -> None:
    """Where the kernel refuses labels (here ramfs has none), the guest is asked and told why."""
    tree, place = make_tree(tmp_path / "tree", TARGETED), tmp_path / "place"
    place.mkdir()
    unshare = ("unshare", "--map-root-user", "--mount")
    possible = shutil.which("unshare") and subprocess.call([*unshare, "true"]) == 0
    require(possible, "mount namespaces are not to be had here")
    script = 'mount -t ramfs none "$1" && cp -a "$0/." "$1" && shift && "$@" && ls -A "$place"'
    done = subprocess.run(
        [
            *(*unshare, "sh", "-c", script, tree, place),
            *(sys.executable, "-m", "vmprovision", "inject", place),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "place": str(place)},
    )
    assert "note: the guest relabels its files" in done.stdout
    assert "cannot be written to its filesystem" in done.stdout
    assert ".autorelabel\n" in done.stdout


def test_a_guest_without_a_policy_costs_one_look(tmp_path: Path) -> None:
    """Rules are neither looked for nor read."""
    looked = []

    class Watched(LocalFilesystem):
        def lstat(self, path):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 -- as its base's
            looked.append(str(path))
            return super().lstat(path)

    make_tree(tmp_path, SYSTEMD_TREE)
    assert inspect_selinux(Watched(tmp_path)) is None
    assert set(looked) <= {"/etc", "/etc/selinux", "/etc/selinux/config"}
