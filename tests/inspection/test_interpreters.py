"""Which Pythons a guest has and whether they run the agent, told without running them."""

from __future__ import annotations

import struct
from pathlib import Path, PurePosixPath

import pytest

import vmprovision
from tests.conftest import require
from tests.trees import OS_RELEASE, Link, Program, Tree, elf, make_tree, python_tree
from vmprovision.filesystem.elf import read_elf
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.inspection.interpreters import find_interpreters

HOSTS_PYTHON = Path("/usr/bin/python3")
SONAME = "libpython3.11.so.1.0"


def found_in(root: Path, files: Tree) -> list[tuple[str, str | None]]:
    """Return path and version of each interpreter in a tree."""
    interpreters = find_interpreters(LocalFilesystem(make_tree(root, files)), "x86_64")
    return [(str(interpreter.path), interpreter.version) for interpreter in interpreters]


def fault_of(root: Path, files: Tree) -> str:
    """Return what is wrong with the one Python of a tree."""
    (found,) = find_interpreters(LocalFilesystem(make_tree(root, files)), "x86_64")
    assert found.is_usable == (not found.fault)
    return found.fault


def linked(
    *,
    loader: str = "",
    libraries: tuple[str, ...] = (),
    path: str = "",
    names: tuple[str, ...] = (),
) -> Program:
    """Return an ELF file with a loader, libraries, a path to them and exported names."""
    words = [*libraries, path, *names]
    table = b"\0" + b"\0".join(word.encode() for word in words) + b"\0"
    places = [table.index(b"\0" + word.encode() + b"\0") + 1 for word in words]
    entries = [(1, place) for place in places[: len(libraries)]]
    entries += [(29, places[len(libraries)]), (5, 0x10000 + 1024), (10, len(table)), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    interpreter = loader.encode() + b"\0" if loader else b""
    parts = ((1, 0, 1024 + len(table)), (2, 512, len(dynamic)), (3, 400, len(interpreter)))
    segments = b"".join(
        struct.pack("<IIQQQQQQ", kind, 0, offset, 0x10000 + offset, 0, size, size, 8)
        for kind, offset, size in parts
        if size
    )
    header = bytearray(elf().content)
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, len(segments) // 56)
    content = (bytes(header) + segments).ljust(400, b"\0") + interpreter
    return Program(content.ljust(512, b"\0") + dynamic.ljust(512, b"\0") + table)


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
    """RHEL 8's minimal install has no other, with its library in lib64."""
    library = "/usr/lib64/python3.6"
    files: Tree = {
        "/usr/libexec/platform-python": Link("platform-python3.6"),
        "/usr/libexec/platform-python3.6": elf(),
        f"{library}/os.py": "#\n",
        **{
            f"{library}/lib-dynload/{m}.cpython-36m.so": elf()
            for m in ("zlib", "select", "_socket")
        },
    }
    assert fault_of(tmp_path, files) == ""
    assert found_in(tmp_path, {}) == [("/usr/libexec/platform-python", "3.6")]


def test_a_versioned_name_alone_is_found(tmp_path: Path) -> None:
    """Ubuntu 12.04 has python3.2 and no python3."""
    assert found_in(tmp_path, {"/usr/bin/python3.2": elf()}) == [("/usr/bin/python3.2", "3.2")]


def test_what_is_not_executable_is_none(tmp_path: Path) -> None:
    """A dangling link, a circle of links, a directory and a plain file are not interpreters."""
    files: Tree = {
        "/usr/bin/python3": Link("gone"),
        "/usr/bin/python": "text",
        "/usr/bin/python2": None,
        "/usr/bin/python3.5": Link("python3.6"),
        "/usr/bin/python3.6": Link("python3.5"),
    }
    assert found_in(tmp_path, files) == []


def without(*names: str) -> Tree:
    """Return a whole Python without the files whose path holds one of these."""
    return {path: what for path, what in python_tree().items() if not any(n in path for n in names)}


BIN, LIB = "/usr/bin/python3.11", "/usr/lib/python3.11"
MUSL, GLIBC = "/lib/ld-musl-x86_64.so.1", "/lib64/ld-linux-x86-64.so.2"
NO_MUSL = f"needs the loader {MUSL}, which is not there"
WORDS = b"zlib.Decompress select.epoll "
CORE = ("PyImport_Import",)
BUILT_IN = (*CORE, "PyInit_zlib", "PyInit_select", "PyInit__socket")


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (python_tree(), ""),
        (without("zlib"), "lacks zlib"),
        (without("select", "_socket"), "lacks select, _socket"),
        (without("lib-dynload"), "lacks zlib, select, _socket"),
        (without(LIB), "has no standard library"),
        ({**python_tree(), f"{LIB}/os.py": ""}, "has no standard library"),
        ({**without("os.py"), f"{LIB}/os.pyc": "x"}, ""),
        ({**without("os.py"), "/usr/lib/python311.zip": "PK"}, ""),
        ({**python_tree(), f"{LIB}/lib-dynload/zlib.cpython-311.so": ""}, "lacks zlib"),
        ({**python_tree(), f"{LIB}/lib-dynload/zlib.cpython-311.so": elf(183)}, "lacks zlib"),
        ({**python_tree(), BIN: elf(183)}, "is for aarch64"),
        ({**python_tree(), BIN: elf(3, bits=32)}, "is for i386"),
        ({"/usr/bin/python3": Program(b"")}, "is not a program but a script or an empty file"),
        (
            {"/usr/bin/python3": Program(b"#!/bin/sh\nexit 1\n")},
            "is not a program but a script or an empty file",
        ),
        (
            {**python_tree(), BIN: linked(loader=MUSL)},
            f"needs the loader {MUSL}, which is not there",
        ),
        ({**python_tree(), BIN: linked(loader=MUSL), MUSL: elf()}, ""),
        (
            {**python_tree(), BIN: linked(loader=GLIBC), GLIBC: elf(183)},
            f"needs the loader {GLIBC}, which is not there",
        ),
        # a module is a part of the program, as in Debian's minimal package
        ({**without("lib-dynload"), BIN: linked(names=BUILT_IN)}, ""),
        ({**without("lib-dynload"), BIN: linked(names=BUILT_IN[:-1])}, "lacks _socket"),
        (
            {**without("lib-dynload"), BIN: elf(content=b"zlib.Decompress select.epoll")},
            "lacks _socket",
        ),
        (
            {
                **without("lib-dynload"),
                BIN: elf(content=WORDS + b"_socket.socket"),
            },
            "",
        ),
        # or of a library that it is linked with
        (
            {**without("lib-dynload"), BIN: linked(libraries=(SONAME,), names=CORE)},
            f"needs the library {SONAME}, which is not there",
        ),
        *(
            (
                {
                    **without("lib-dynload"),
                    BIN: linked(libraries=("libc.so.6", SONAME), path=where, names=CORE),
                    f"{folder}/{SONAME}": linked(names=BUILT_IN),
                    "/etc/ld.so.conf.d/x.conf": "# here\n/opt/lib\n",
                },
                "",
            )
            for folder, where in (
                ("/usr/lib64", ""),
                ("/usr/lib/x86_64-linux-gnu", ""),
                ("/opt/lib", ""),
                ("/usr/share/lib", "/nowhere:$ORIGIN/../share/lib"),
            )
        ),
        # Python 2 has other names
        (
            {
                "/usr/bin/python2.7": elf(),
                "/usr/lib64/python2.7/os.pyo": "x",
                **{
                    f"/usr/lib64/python2.7/lib-dynload/{name}module.so": elf()
                    for name in ("zlib", "select", "_socket")
                },
            },
            "",
        ),
    ],
)
def test_a_python_that_lacks_what_the_agent_needs_is_not_usable(
    files: Tree, fault: str, tmp_path: Path
) -> None:
    """Its files say so: the program, its loader and library, the modules, the machine."""
    assert fault_of(tmp_path, files) == fault


def test_the_hosts_own_python_is_usable() -> None:
    """A real one, of a distribution, with its modules built in or beside it."""
    require(HOSTS_PYTHON.exists(), "this host has no /usr/bin/python3")
    reader = LocalFilesystem(Path("/"))
    found = find_interpreters(reader, "unknown")
    assert [each.fault for each in found if each.path == PurePosixPath(HOSTS_PYTHON)] == [""]


def test_a_damaged_program_is_no_exception(tmp_path: Path) -> None:
    """Tables that lead beyond the file, and sizes that no file has."""
    whole = linked(loader=GLIBC, libraries=(SONAME,), path="/x", names=BUILT_IN).content
    reader = LocalFilesystem(tmp_path)
    for place in range(len(whole)):
        damaged = whole[:place] + b"\xff" * 8 + whole[place + 8 :]
        (tmp_path / "x").write_bytes(damaged)
        read_elf(reader, PurePosixPath("/x"))
        if place % 16 == 0:
            make_tree(tmp_path, {"/y": Program(whole[:place])})
            read_elf(reader, PurePosixPath("/y"))


def test_a_guest_of_another_machine_keeps_its_python(tmp_path: Path) -> None:
    """The guest's own programs, not this host, decide which program is foreign."""
    files: Tree = {
        "/etc/os-release": OS_RELEASE,
        "/sbin/init": Link("/usr/lib/systemd/systemd"),
        "/usr/lib/systemd/systemd": elf(183),
        **python_tree(machine=183),
    }
    found = vmprovision.inspect(make_tree(tmp_path, files))
    assert found.arch == "aarch64"
    assert found.usable_python is not None
