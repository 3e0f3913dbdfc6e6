"""Guests whose filesystems the kernel compares with a hash: a change would end them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import SYSTEMD_TREE, Link, Tree, make_tree, tree_state

if TYPE_CHECKING:
    from pathlib import Path

HASH = "0123456789abcdef" * 4
EXTLINUX = "default linux\nlabel linux\n  linux /vmlinuz\n  append root=/dev/sda1 {}\n"
GRUB = "menuentry 'Linux' {{\n  linux /vmlinuz root=/dev/sda1 {}\n}}\n"
ENTRY = "title Linux\nlinux /vmlinuz\noptions root=/dev/sda1 {}\n"
USR_IN_VAR: Tree = {
    **{path: what for path, what in SYSTEMD_TREE.items() if not path.startswith("/usr/local")},
    "/usr/local": Link("../var/usrlocal"),
    "/var/usrlocal/bin": None,
}


@pytest.mark.parametrize(
    ("menu", "text"),
    [
        ("/boot/extlinux/extlinux.conf", EXTLINUX),
        ("/boot/grub/grub.cfg", GRUB),
        ("/boot/loader/entries/linux.conf", ENTRY),
    ],
)
@pytest.mark.parametrize("option", ["roothash", "usrhash", "verity.usrhash"])
def test_a_sealed_guest_is_refused(menu: str, text: str, option: str, tmp_path: Path) -> None:
    """The menu and its option are named, and the way that writes nothing."""
    root = make_tree(tmp_path, {**SYSTEMD_TREE, menu: text.format(f"{option}={HASH}")})
    before = tree_state(root)
    with pytest.raises(vmprovision.UnsupportedGuestError, match=f"{option}=") as caught:
        vmprovision.inject(root)
    assert menu.split("/")[2] in caught.value.message
    assert "vmprovision seed" in caught.value.hint
    assert tree_state(root) == before


def test_a_sealed_usr_is_left_alone_where_the_agent_goes_elsewhere(tmp_path: Path) -> None:
    """/usr/local that leads into /var is on no sealed filesystem, and the note says what is."""
    menu = {"/boot/extlinux/extlinux.conf": EXTLINUX.format(f"usrhash={HASH}")}
    root = make_tree(tmp_path, {**USR_IN_VAR, **menu})
    report = vmprovision.inject(root)
    assert not [path for path in report.changed if path.is_relative_to("/usr")]
    assert any("/usr is sealed" in note for note in report.guest.notes)
    assert vmprovision.verify(root).mismatches == ()


def test_an_entry_that_does_not_boot_seals_nothing(tmp_path: Path) -> None:
    """Only what boots by default counts."""
    text = GRUB.format("") + GRUB.format(f"roothash={HASH}").replace("'Linux'", "'Other'")
    root = make_tree(tmp_path, {**SYSTEMD_TREE, "/boot/grub/grub.cfg": text})
    assert vmprovision.inject(root).changed


def test_a_sealed_guest_with_cloud_init_gets_a_seed(tmp_path: Path) -> None:
    """The image is read, and nothing of it is changed."""
    menu = {"/boot/extlinux/extlinux.conf": EXTLINUX.format(f"roothash={HASH}")}
    files = {**SYSTEMD_TREE, **menu, "/usr/bin/cloud-init": "#!/usr/bin/python3\n"}
    root = make_tree(tmp_path / "root", files)
    before = tree_state(root)
    report = vmprovision.make_seed(root, tmp_path / "seed.iso")
    assert report.kind == "cloud-init"
    assert any("the guest's root is sealed" in note for note in report.notes)
    assert tree_state(root) == before


def test_no_seed_is_made_for_a_sealed_usr_that_the_agent_would_go_to(tmp_path: Path) -> None:
    """The running guest cannot write there either, and the path is named."""
    menu = {"/boot/extlinux/extlinux.conf": EXTLINUX.format(f"usrhash={HASH}")}
    files = {**SYSTEMD_TREE, **menu, "/usr/bin/cloud-init": "#!/usr/bin/python3\n"}
    root = make_tree(tmp_path / "root", files)
    with pytest.raises(vmprovision.UnsupportedGuestError, match="/usr/local") as caught:
        vmprovision.make_seed(root, tmp_path / "seed.iso")
    assert "/var" in caught.value.hint
    assert not (tmp_path / "seed.iso").exists()
