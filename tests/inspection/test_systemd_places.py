"""Where a systemd guest takes a service from: the target that boots, and presets that agree."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.conftest import require
from tests.trees import SYSTEMD_TREE, Link, Tree, make_tree, tree_state
from vmprovision.errors import UnsupportedGuestError

if TYPE_CHECKING:
    from pathlib import Path

ETC, LIB = "/etc/systemd/system", "/usr/lib/systemd/system"
MULTI_USER = "[Unit]\nDescription=Multi-User\nRequires=basic.target\n"
GUEST: Tree = {
    **SYSTEMD_TREE,
    "/etc/systemd/system/multi-user.target.wants": None,
    f"{LIB}/basic.target": "[Unit]\nRequires=sysinit.target\n",
    f"{LIB}/sysinit.target": "[Unit]\nWants=local-fs.target swap.target\n",
    f"{LIB}/multi-user.target": MULTI_USER,
    f"{LIB}/graphical.target": "[Unit]\nRequires=multi-user.target\nWants=x.service\n",
    f"{LIB}/runlevel3.target": Link("multi-user.target"),
    f"{LIB}/rescue.target": "[Unit]\nRequires=sysinit.target\n",
    f"{LIB}/default.target": Link("graphical.target"),
}
KIOSK = "[Unit]\nRequires=basic.target\nAllowIsolate=yes\n"
MASK = Link("/dev/null")


def default(name: str, more: Tree | None = None) -> Tree:
    """Return a guest whose administrator has chosen a default target."""
    return {**GUEST, f"{ETC}/default.target": Link(name), **(more or {})}


@pytest.mark.parametrize(
    ("files", "target"),
    [
        (GUEST, "multi-user"),
        (SYSTEMD_TREE, "multi-user"),
        (default(f"{LIB}/multi-user.target"), "multi-user"),
        (default("../../../usr/lib/systemd/system/runlevel3.target"), "multi-user"),
        ({**GUEST, f"{ETC}/default.target": KIOSK}, "default"),
        (default("kiosk.target", {f"{ETC}/kiosk.target": KIOSK}), "kiosk"),
        (default(f"{LIB}/basic.target"), "basic"),
        (
            default(
                "k.target", {f"{ETC}/k.target": "[Unit]\nWants=a.target \\\n graphical.target"}
            ),
            "multi-user",
        ),
        (
            default("k.target", {f"{ETC}/k.target": "[Install]\nWants=multi-user.target\n"}),
            "k",
        ),
        (
            default(
                "k.target",
                {
                    f"{ETC}/k.target": KIOSK,
                    f"{ETC}/k.target.wants/multi-user.target": Link(f"{LIB}/multi-user.target"),
                },
            ),
            "multi-user",
        ),
        (
            default(
                "k.target",
                {
                    f"{ETC}/k.target": KIOSK,
                    f"{LIB}/k.target.d/more.conf": "[Unit]\nBindsTo=multi-user.target\n",
                },
            ),
            "multi-user",
        ),
        (
            default(
                "k.target",
                {
                    f"{ETC}/k.target": "[Unit]\nWants=multi-user.target\n",
                    f"{ETC}/multi-user.target": MASK,
                },
            ),
            "k",
        ),
        ({**GUEST, "/boot/extlinux.conf": "APPEND root=x systemd.unit=basic.target\n"}, "basic"),
        ({**GUEST, "/boot/extlinux.conf": "APPEND root=x 3\n"}, "multi-user"),
    ],
)
def test_the_agent_is_enabled_in_the_target_that_boots(
    files: Tree, target: str, tmp_path: Path
) -> None:
    """multi-user.target where that is reached; else the one that is started in its place."""
    make_tree(tmp_path, files)
    before = tree_state(tmp_path)
    vmprovision.inject(tmp_path)
    links = [path for path in tmp_path.glob("etc/systemd/system/*.wants/*") if "agent" in path.name]
    assert [path.parent.name for path in links] == [f"{target}.target.wants"]
    unit = (tmp_path / "etc/systemd/system/guest-agent.service").read_text()
    assert f"WantedBy={target}.target\n" in unit
    assert not vmprovision.verify(tmp_path).mismatches
    assert not vmprovision.inject(tmp_path).changed
    vmprovision.remove(tmp_path)
    assert tree_state(tmp_path) == before


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (default("/dev/null"), "masked"),
        (default("gone.target"), "missing"),
        (default(f"{LIB}/rescue.target"), "no services"),
        ({**GUEST, f"{ETC}/multi-user.target": MASK}, "needs multi-user.target, which is masked"),
        ({**GUEST, f"{ETC}/multi-user.target": ""}, "needs multi-user.target, which is masked"),
        ({**GUEST, "/boot/extlinux.conf": "APPEND root=x systemd.unit=emergency\n"}, "missing"),
        ({**GUEST, "/boot/extlinux.conf": "APPEND root=x single\n"}, "rescue.target"),
        (
            {
                **GUEST,
                "/boot/extlinux.conf": "APPEND systemd.unit=basic.target\n",
                "/boot/grub/menu.lst": "title a\nkernel /v\n",
            },
            "different targets",
        ),
        ({name: what for name, what in GUEST.items() if "default" not in name}, "missing"),
        (
            default(
                "a.target",
                {f"{ETC}/a.target": Link("b.target"), f"{ETC}/b.target": Link("a.target")},
            ),
            "missing",
        ),
        ({**GUEST, "/usr/lib/systemd/system-preset/\u0001.preset": "disable *\n"}, "presets"),
    ],
)
def test_a_guest_that_starts_no_service_is_refused(files: Tree, why: str, tmp_path: Path) -> None:
    """With the reason, and nothing is written; who knows better says so with --init."""
    make_tree(tmp_path, files)
    before = tree_state(tmp_path)
    assert why in str(vmprovision.inspect(tmp_path).init.obstacle)
    with pytest.raises(UnsupportedGuestError, match="would not start the agent") as caught:
        vmprovision.inject(tmp_path)
    assert why in caught.value.message
    assert "--init systemd" in caught.value.hint
    assert tree_state(tmp_path) == before
    told = vmprovision.InjectOptions(init="systemd")
    assert vmprovision.plan(tmp_path, told).operations


@pytest.mark.parametrize("target", ["/run/wants", "/dev/x", "../../../run"])
def test_links_into_what_is_made_at_boot_are_refused(target: str, tmp_path: Path) -> None:
    """A file behind a link into /run is gone when the guest runs, so it is refused."""
    files = {name: what for name, what in GUEST.items() if "multi-user.target.wants" not in name}
    make_tree(tmp_path, {**files, f"{ETC}/multi-user.target.wants": Link(target)})
    with pytest.raises(UnsupportedGuestError, match="empty at each boot"):
        vmprovision.inject(tmp_path)


def test_a_link_elsewhere_is_followed_inside_the_guest(tmp_path: Path) -> None:
    """Also one that leads nowhere yet, and of a target that is not the usual one."""
    files = default("k.target", {f"{ETC}/k.target": KIOSK, f"{ETC}/k.target.wants": Link("/opt/k")})
    make_tree(tmp_path, files)
    vmprovision.inject(tmp_path)
    assert (tmp_path / "opt/k/guest-agent.service").is_symlink()
    assert not vmprovision.verify(tmp_path).mismatches


@pytest.mark.parametrize(
    "name",
    [
        *("99-default-disable", "50-default", "50-guest-aaa", "10-container-disable"),
        *("00-disable-all", "00-guest-agent-not", "00", "0", "00-aaa", "-first", "!first", "#"),
    ],
)
@pytest.mark.parametrize("folder", ["/usr/lib/systemd/system-preset", "/etc/systemd/system-preset"])
def test_presets_of_the_guest_do_not_take_the_link_away(
    name: str, folder: str, tmp_path: Path
) -> None:
    """systemd.preset(5): the first line that matches counts, by file name; systemd judges."""
    require(shutil.which("systemctl"), "systemctl is not installed")
    make_tree(tmp_path, {**GUEST, f"{folder}/{name}.preset": "disable *\n"})
    vmprovision.inject(tmp_path)
    assert not vmprovision.inject(tmp_path).changed
    for command, words in (("preset-all", ""), ("is-enabled", "enabled\n")):
        unit = [] if command == "preset-all" else ["guest-agent.service"]
        done = subprocess.run(
            ["systemctl", f"--root={tmp_path}", command, *unit],
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.endswith(words)


def test_an_upgrade_takes_the_preset_of_an_older_name_away(tmp_path: Path) -> None:
    """A guest whose presets have changed since has one of ours, under the name that wins now."""
    make_tree(tmp_path, GUEST)
    before = tree_state(tmp_path)
    presets = tmp_path / "etc/systemd/system-preset"
    vmprovision.inject(tmp_path)
    assert [path.name for path in presets.iterdir()] == ["00-guest-agent.preset"]
    make_tree(tmp_path, {"/usr/lib/systemd/system-preset/00-a.preset": "disable *\n"})
    vmprovision.inject(tmp_path)
    assert [path.name for path in presets.iterdir()] == ["0-guest-agent.preset"]
    assert not vmprovision.verify(tmp_path).mismatches
    shutil.rmtree(tmp_path / "usr/lib/systemd/system-preset")
    vmprovision.remove(tmp_path)
    assert tree_state(tmp_path) == before
