"""Release files of real distributions, each read as its folder's name says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import RELEASE_FILES, Tree, elf, make_tree
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.inspection.distribution import inspect_distribution, parse_os_release

if TYPE_CHECKING:
    from pathlib import Path

# folder -> ID, where the distribution's own files give another name than the folder has
OTHER_NAMES = {
    "altlinux10": "altlinux",
    "amazon2014": "amzn",
    "amazon2016": "amzn",
    "amazon2023": "amzn",
    "armbian": "debian",  # its os-release is Debian's, unchanged
    "bttcb1": "debian",
    "centosstream10": "centos",
    "centosstream8": "centos",
    "centosstream9": "centos",
    "debiantesting": "debian",
    "kvmibm1": "kvmibm",
    "linuxmint17": "ubuntu",  # its os-release is Ubuntu's, unchanged
    "mandriva2011": "mandrivalinux",
    "opensuse15": "opensuse-leap",
    "oracle7": "ol",
    "scientific7": "rhel",  # its os-release says so
}

OTHER_VERSIONS = {
    "bttcb1": "11",  # the folder's number is the board's
    "linuxmint17": "1404",
    "manjaro1512": "",  # a rolling release; its os-release has no version
}


@pytest.mark.parametrize("folder", sorted(path.name for path in RELEASE_FILES.iterdir()))
def test_release_files_of_real_distributions(folder: str) -> None:
    """ID and major version are those that the folder is named by."""
    found = inspect_distribution(LocalFilesystem(RELEASE_FILES / folder))
    name, number = re.fullmatch(r"(.*?)(\d*)", folder).groups()  # type: ignore[union-attr]
    assert found.id == OTHER_NAMES.get(folder, name)
    assert found.version.replace(".", "").startswith(OTHER_VERSIONS.get(folder, number))
    assert found.product_name


def test_versions_keep_their_zeros(tmp_path: Path) -> None:
    """14.04 is not 14.4."""
    make_tree(tmp_path, {"/etc/lsb-release": "DISTRIB_ID=Ubuntu\nDISTRIB_RELEASE=14.04\n"})
    assert inspect_distribution(LocalFilesystem(tmp_path)).version == "14.04"


def test_release_file_in_usr_lib_alone_is_enough(tmp_path: Path) -> None:
    """os-release(5) has it there; /etc may be empty."""
    make_tree(tmp_path, {"/usr/lib/os-release": "ID=arch\n", "/etc/hostname": "x"})
    assert inspect_distribution(LocalFilesystem(tmp_path)).id == "arch"


def test_escape_sequences_never_leave_the_guest(tmp_path: Path) -> None:
    """A name that would clear the terminal comes out as text."""
    text = 'ID=debian\nPRETTY_NAME="\x1b[2JEvil\x07\u202e"\n'
    make_tree(tmp_path, {"/etc/os-release": text, "/sbin/init": elf()})
    name = vmprovision.inspect(tmp_path).distribution.product_name
    assert name == "\\x1b[2JEvil\\x07\\u202e"


def test_a_huge_release_file_is_read_in_part(tmp_path: Path) -> None:
    """Sizes are the guest's choice, so no file is read without a limit."""
    make_tree(tmp_path, {"/etc/os-release": "ID=debian\n" + "#" * (8 << 20)})
    assert inspect_distribution(LocalFilesystem(tmp_path)).id == "debian"


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (r'"a \"b\" \\ \$x \`y\` \z"', r'a "b" \ $x `y` \z'),
        (r"'a \"b\" $x'", r"a \"b\" $x"),
        (r"""it\'s" "fine""", "it's fine"),
        (r"two\ words  # a comment", "two words"),
        ('"a # b"', "a # b"),
        ('"not closed', "not closed"),
        ("a\\", "a"),
    ],
)
def test_values_are_quoted_as_in_a_shell(raw: str, name: str) -> None:
    """os-release(5): shell-compatible assignments, so with a shell's quotes and escapes."""
    found = parse_os_release(f"ID=debian\nPRETTY_NAME={raw}\n")
    assert found is not None
    assert found.product_name == name


@pytest.mark.parametrize(
    "identifier", ['"two words"', "$(reboot)", '"\x1b[2J"', "a/b", "'é'", "a" * 70, '"a\\nb"']
)
def test_an_id_outside_its_alphabet_is_unknown(identifier: str, tmp_path: Path) -> None:
    """os-release(5): digits, lower-case letters, ".", "_" and "-"; the rest is what it was."""
    make_tree(tmp_path, {"/etc/os-release": f"ID={identifier}\nNAME=Mine\nVERSION_ID=7\n"})
    found = inspect_distribution(LocalFilesystem(tmp_path))
    assert (found.id, found.product_name, found.version) == ("unknown", "Mine", "7")


def test_an_id_of_lsb_release_keeps_to_the_same_alphabet(tmp_path: Path) -> None:
    """Its names have capitals and blanks; what else is in one makes it unknown."""
    for name, identifier in {"Linux Mint": "linuxmint", "$(reboot)": "unknown"}.items():
        make_tree(tmp_path, {"/etc/lsb-release": f'DISTRIB_ID="{name}"\n'})
        assert inspect_distribution(LocalFilesystem(tmp_path)).id == identifier


def test_a_name_is_no_longer_than_a_line(tmp_path: Path) -> None:
    """Names and versions go into reports and onto terminals."""
    make_tree(tmp_path, {"/etc/os-release": f"ID=a\nNAME={'n' * 9000}\nVERSION_ID={'1' * 9000}"})
    found = inspect_distribution(LocalFilesystem(tmp_path))
    assert max(len(found.product_name), len(found.version)) <= 200


@pytest.mark.parametrize("text", ["", "\0\0\0", "ID", "=x", "ID='", "[section]\nA=b"])
def test_a_release_file_that_says_nothing_is_none(text: str) -> None:
    """Damaged files make no distribution and no exception."""
    assert parse_os_release(text) is None


def test_programs_tell_the_architecture_of_the_userland(tmp_path: Path) -> None:
    """A 32-bit ARM userland is told by its programs, whatever kernel it has."""
    files: Tree = {"/etc/os-release": "ID=debian\n", "/sbin/init": elf(40, bits=32)}
    assert vmprovision.inspect(make_tree(tmp_path, files)).arch == "armv7l"
