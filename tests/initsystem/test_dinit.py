"""Where dinit's ``boot`` finds the agent, and what the agent waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.inspection import documented_trees
from tests.trees import Link, Tree, elf, make_tree, python_tree

if TYPE_CHECKING:
    from pathlib import Path

DINIT: Tree = {
    "/etc/os-release": "ID=linux\n",
    "/sbin/init": Link("dinit"),
    "/sbin/dinit": elf(content=b"/etc/dinit.d"),
}
INTERNAL = "type = internal\n"


def guest_of(tmp_path: Path, files: Tree) -> Path:
    """Return a guest with these files and a Python."""
    return make_tree(make_tree(tmp_path / "guest", files), python_tree())


def description_of(root: Path) -> list[str]:
    """Return the lines of the agent's description after an injection."""
    vmprovision.inject(root)
    return (root / "etc/dinit.d/guest-agent").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("tree", "ready"),
    [
        (documented_trees.CHIMERA, "local.target"),
        (documented_trees.DINIT_EXAMPLE, "loginready"),
        (documented_trees.ARTIX_DINIT, "loginready"),
    ],
    ids=["chimera", "example", "artix"],
)
def test_the_agent_waits_until_file_systems_are_writable(
    tree: Tree, ready: str, tmp_path: Path
) -> None:
    """It waits for what the daemons of the same guest depend on."""
    waits = [each for each in description_of(guest_of(tmp_path, tree)) if "waits-for" in each]
    assert waits == [f"waits-for: {ready}"]


def test_without_a_known_name_it_waits_for_what_boot_names(tmp_path: Path) -> None:
    """Dinit's manual asks that ``boot`` depends on what mounts the root."""
    files: Tree = {
        **DINIT,
        "/etc/dinit.d/boot": INTERNAL
        + "depends-on: rootfs\ndepends-ms = getty@tty1\nwaits-for: net # soft\n"
        + "waits-for: absent\nafter: late\nwaits-for.d: boot.d\n",
        **{f"/etc/dinit.d/{name}": INTERNAL for name in ("getty", "late", "net")},
        "/lib/dinit.d/rootfs": INTERNAL,
    }
    lines = description_of(guest_of(tmp_path, files))
    assert [each for each in lines if "waits-for" in each] == [
        "waits-for: rootfs",
        "waits-for: net",
    ]


@pytest.mark.parametrize(
    ("boot", "setting", "link", "target"),
    [
        ("/etc/dinit.d/boot", "waits-for.d: boot.d", "/etc/dinit.d/boot.d", "../guest-agent"),
        (
            "/lib/dinit.d/boot",
            "waits-for.d=/etc/dinit.d/boot.d",
            "/etc/dinit.d/boot.d",
            "../guest-agent",
        ),
        (
            "/usr/local/lib/dinit.d/boot",
            "waits-for.d: enabled.d",
            "/usr/local/lib/dinit.d/enabled.d",
            "/etc/dinit.d/guest-agent",
        ),
        (
            "/etc/dinit.d/boot",
            "depends-on.d: core.d\nwaits-for.d: /run/boot.d\nwaits-for.d: late.d",
            "/etc/dinit.d/late.d",
            "../guest-agent",
        ),
    ],
)
def test_the_link_is_where_boot_looks(
    boot: str, setting: str, link: str, target: str, tmp_path: Path
) -> None:
    """A relative directory is beside the description; one in /run does not last."""
    files: Tree = {**DINIT, boot: f"{INTERNAL}{setting}\n"}
    plan = vmprovision.plan(guest_of(tmp_path, files))
    links = [o for o in plan.as_json()["operations"] if o["operation"] == "Symlink"]
    assert [(o["path"], o["target"]) for o in links if "dinit" in o["path"]] == [
        (f"{link}/guest-agent", target)
    ]


def test_the_first_description_of_boot_counts(tmp_path: Path) -> None:
    """The search path of dinit(8): /etc before /usr/local/lib before /lib."""
    files: Tree = {
        **DINIT,
        "/lib/dinit.d/boot": f"{INTERNAL}waits-for.d: boot.d\n",
        "/etc/dinit.d/boot": f"{INTERNAL}waits-for.d: mine.d\n",
    }
    init = vmprovision.inspect(guest_of(tmp_path, files)).init
    assert (init.system, str(init.hook)) == ("dinit", "/etc/dinit.d/mine.d")


def test_a_boot_without_a_directory_gets_a_line(tmp_path: Path) -> None:
    """The line is gone after ``remove``, and the file as before."""
    boot = f"{INTERNAL}depends-on: rcboot\n"
    root = guest_of(tmp_path, {**DINIT, "/etc/dinit.d/boot": boot, "/etc/dinit.d/rcboot": INTERNAL})
    vmprovision.inject(root)
    path = root / "etc/dinit.d/boot"
    assert "\nwaits-for: guest-agent\n" in path.read_text(encoding="utf-8")
    assert "waits-for: rcboot\n" in (root / "etc/dinit.d/guest-agent").read_text(encoding="utf-8")
    vmprovision.remove(root)
    assert path.read_text(encoding="utf-8") == boot
    assert not (root / "etc/dinit.d/guest-agent").exists()


def test_dinit_without_boot_is_no_verdict(tmp_path: Path) -> None:
    """It would start nothing."""
    assert vmprovision.inspect(guest_of(tmp_path, DINIT)).init.system is None
