"""Circles of links at the places that inspection looks at: nothing is there, for who reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import SYSTEMD_TREE, Link, make_tree
from vmprovision.filesystem.protocol import LinkCircleError

if TYPE_CHECKING:
    from pathlib import Path

PLACES = (
    *("/etc/fstab", "/etc/selinux/config", "/etc/selinux", "/etc/inittab", "/etc/rc.local"),
    *("/etc/debian_version", "/etc/lsb-release", "/etc/init.d", "/etc/rc.d", "/etc/runit"),
    *("/etc/dinit.d", "/etc/kernel/cmdline", "/etc/default/grub", "/etc/auto.master"),
    *("/usr/lib/os-release", "/usr/bin/python3.9", "/usr/libexec/platform-python", "/lib64"),
    *("/boot", "/boot/vmlinuz-6.1", "/boot/grub/grub.cfg", "/boot/grub2", "/boot/loader"),
    *("/var", "/var/log", "/var/lib/dpkg", "/ostree", "/nix", "/gnu", "/opt", "/root"),
    *("/usr/lib/systemd/system", "/etc/systemd/system.control", "/etc/guest-agent.conf"),
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("length", [1, 2])
def test_a_circle_is_passed_over(place: str, length: int, tmp_path: Path) -> None:
    """The guest is what it is without it, and can be explained and planned for."""
    target = place if length == 1 else f"{place}.other"
    files = {**SYSTEMD_TREE, place: Link(target)}
    if length > 1:
        files[target] = Link(place)
    root = make_tree(tmp_path / "root", files)
    guest = vmprovision.inspect(root, explain=True)
    assert guest.init.system == "systemd"
    assert guest.distribution.id == "debian"
    assert vmprovision.plan(root).operations


@pytest.mark.parametrize("place", ["/usr/local", "/usr/local/lib", "/etc/systemd/system-preset"])
def test_a_circle_where_the_plan_writes_is_refused(place: str, tmp_path: Path) -> None:
    """Nothing can be put there, and the error names the place."""
    files = {name: what for name, what in SYSTEMD_TREE.items() if name != "/usr/local/bin"}
    root = make_tree(tmp_path / "root", {**files, place: Link(place)})
    assert vmprovision.inspect(root).init.system == "systemd"
    with pytest.raises(LinkCircleError, match=f"{place} leads through a circle"):
        vmprovision.plan(root)
