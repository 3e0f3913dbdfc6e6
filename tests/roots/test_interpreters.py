"""Which Pythons a guest has, told without running them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.trees import Link, Tree, elf, make_tree
from vmprovision.filesystem import LocalFilesystem
from vmprovision.inspection.interpreters import find_interpreters

if TYPE_CHECKING:
    from pathlib import Path


def found_in(root: Path, files: Tree) -> list[tuple[str, str | None]]:
    """Path and version of each interpreter in a tree."""
    interpreters = find_interpreters(LocalFilesystem(make_tree(root, files)))
    return [(str(interpreter.path), interpreter.version) for interpreter in interpreters]


def test_a_link_tells_the_version(tmp_path: Path) -> None:
    """python3 -> python3.11 is one interpreter, 3.11."""
    files: Tree = {"/usr/bin/python3": Link("python3.11"), "/usr/bin/python3.11": elf()}
    assert found_in(tmp_path, files) == [("/usr/bin/python3", "3.11")]


def test_usr_merge_does_not_double_it(tmp_path: Path) -> None:
    """/bin -> usr/bin shows the same file, which is listed once."""
    files: Tree = {"/usr/bin/python3.9": elf(), "/bin": Link("usr/bin")}
    assert found_in(tmp_path, files) == [("/usr/bin/python3.9", "3.9")]


def test_the_standard_library_tells_the_version(tmp_path: Path) -> None:
    """Where the program is just python3, the one library beside it says which."""
    files: Tree = {
        "/usr/bin/python3": elf(),
        "/usr/lib64/python3.6/os.py": "",
        "/usr/lib/python2.7": None,
    }
    assert found_in(tmp_path, files) == [("/usr/bin/python3", "3.6")]


def test_platform_python_is_found(tmp_path: Path) -> None:
    """RHEL 8's minimal install has no other."""
    files: Tree = {
        "/usr/libexec/platform-python": Link("platform-python3.6"),
        "/usr/libexec/platform-python3.6": elf(),
    }
    assert found_in(tmp_path, files)[0][0] == "/usr/libexec/platform-python"


def test_a_versioned_name_alone_is_found(tmp_path: Path) -> None:
    """Ubuntu 12.04 has python3.2 and no python3."""
    assert found_in(tmp_path, {"/usr/bin/python3.2": elf()}) == [("/usr/bin/python3.2", "3.2")]


def test_what_is_not_executable_is_none(tmp_path: Path) -> None:
    """A dangling link, a directory and a plain file are no interpreters."""
    files: Tree = {
        "/usr/bin/python3": Link("gone"),
        "/usr/bin/python": "text",
        "/usr/bin/python2": None,
    }
    assert found_in(tmp_path, files) == []
