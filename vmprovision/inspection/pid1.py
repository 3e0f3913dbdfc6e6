"""Find the program that the guest's kernel starts as process 1, with the evidence.

Directories mislead: Upstart guests have ``/etc/systemd``, and systemd guests have
``/etc/init.d``. So this module follows the kernel: ``init=`` on the boot loader's
command line (kernel-command-line(7)), else the first of the four paths that the kernel
tries (``init/main.c``), through the guest's links. It identifies that file by its name,
by its package and by its content.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.errors import printable
from vmprovision.filesystem.protocol import follow, read_text
from vmprovision.guest.facts import Pid1, Seal
from vmprovision.guest.shelltext import without_comments
from vmprovision.inspection.bootmenu import read_boot_menus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.inspection.bootmenu import BootMenu

KERNEL_ORDER = ("/sbin/init", "/etc/init", "/bin/init", "/bin/sh")
PROGRAM_LIMIT = 8 << 20
EXECUTABLE = 0o111
SCRIPT_DEPTH = 3
SCRIPT_LIMIT = 64 << 10
SUCCESSORS_LIMIT = 8  # SCRIPT_DEPTH times over, each a file to read
OFFERED_LIMIT = 8
NAMED_LIMIT = 16
INCONCLUSIVE = ("shell", "unknown", "script")  # programs that do not identify the init system

# Its place below /usr, for a tree without the links into /usr.
MERGED = ("/usr/sbin/init", "/usr/bin/init")

_BY_NAME = {
    "systemd": "systemd",
    "upstart": "upstart",
    "runit-init": "runit",
    "runit": "runit",
    "openrc-init": "openrc-init",
    "dinit": "dinit",
    "dinit-init": "dinit",
    "finit": "finit",
    "procd": "procd",
    "sysvinit": "sysvinit",
    "shepherd": "shepherd",
    "s6-linux-init": "s6",
    "s6-svscan": "s6",
    "minit": "minit",
    "tini": "tini",
    "dumb-init": "dumb-init",
    "toybox": "toybox",
    "sh": "shell",
    "bash": "shell",
    "dash": "shell",
    "ash": "shell",
}
_BY_PACKAGE = {
    "systemd-sysv": "systemd",
    "upstart": "upstart",
    "upstart-sysv": "upstart",
    "sysvinit-core": "sysvinit",
    "runit-init": "runit",
    "finit-sysv": "finit",
    "sysvinit": "sysvinit",
    "dinit-init": "dinit",
}
# Text that only the program itself contains, most specific first: BusyBox and sysvinit
# both know /etc/inittab, and Upstart's telinit names both.
_BY_CONTENT = (
    (b"BusyBox v", "busybox"),
    (b"com.ubuntu.Upstart", "upstart"),
    (b"libsystemd-core-", "systemd"),
    (b"org.freedesktop.systemd1", "systemd"),
    (b"/etc/dinit.d", "dinit"),
    (b"/etc/finit.conf", "finit"),
    (b"/etc/runit/", "runit"),
    (b"/run/runit.stopit", "runit"),
    (b"/etc/preinit", "procd"),
    (b"OpenRC init", "openrc-init"),
    (b"/etc/inittab", "sysvinit"),
)


_EXEC = re.compile(r"\bexec\s+([^;&|]*)")
_PROGRAM = re.compile(r"/(?!dev/|proc/)[\w./+-]{1,4000}")
_SVSCAN = re.compile(r"(?:^|[/\s])s6-svscan(?:\s|$)")


def find_pid1(reader: GuestReader, subvolume: str = "") -> Pid1:
    """Return the program that the guest's kernel starts.

    Args:
        reader: the guest's files.
        subvolume: the btrfs subvolume that is the guest's root, if it is one.
    """
    menus = read_boot_menus(reader, subvolume)
    offered = _other_entries(reader, menus)
    named = _named_inits(menus)
    found = [_started(reader, init) for init in named[:NAMED_LIMIT]]
    programs = dict.fromkeys(each.program for each in found)
    unread = next((menu.doubt for menu in menus if menu.doubt), "")
    if len(programs) > 1 or len(named) > NAMED_LIMIT or unread:
        evidence = dict.fromkeys(sentence for each in found for sentence in each.evidence)
        return Pid1(
            program="unknown",
            path=None,
            evidence=tuple(evidence),
            doubt=f"the boot menu may start another init than the one found: {unread}"
            if unread
            else "the boot loader's files do not agree on what process 1 is: "
            + ", ".join(programs),
            offered=offered,
            seals=_seals(menus),
        )
    units = dict.fromkeys(unit for menu in menus for unit in menu.units)
    return replace(found[0], offered=offered, units=tuple(units), seals=_seals(menus))


def _seals(menus: Sequence[BootMenu]) -> tuple[Seal, ...]:
    """Return the sealed places of every entry that may boot, each place once."""
    found = {
        place: Seal(place=place, origin=f"{menu.path} starts the kernel with {name}=")
        for menu in menus
        for entry in menu.may_boot
        for name, place in entry.seals
    }
    return tuple(found.values())


# the path in init=, and the menu that has it
_Named = tuple[PurePosixPath | None, PurePosixPath | None]


def _named_inits(menus: Sequence[BootMenu]) -> list[_Named]:
    """Return every ``init=`` that may apply, each once; None means the kernel's own order."""
    found: dict[PurePosixPath | None, PurePosixPath | None] = {}
    for menu in menus:
        for init in menu.inits:
            found.setdefault(init, menu.path)
    return list(found.items()) or [(None, None)]


def _other_entries(reader: GuestReader, menus: Sequence[BootMenu]) -> tuple[tuple[str, str], ...]:
    """Return each ``init=`` of the other entries, with its file and line."""
    found: dict[PurePosixPath, str] = {}
    for menu in menus:
        for entry in menu.entries:
            if entry.init and entry.init not in menu.inits:
                title = f"the entry {entry.title!r}" if entry.title else "an entry"
                found.setdefault(entry.init, f"{title} of {menu.path} has init={entry.init}")
    return tuple(
        (_started(reader, (init, None)).program, seen)
        for init, seen in list(found.items())[:OFFERED_LIMIT]
    )


def _started(reader: GuestReader, named: _Named) -> Pid1:
    """Return the program that the kernel starts with this ``init=``, or without one."""
    evidence: list[str] = []
    starts = [PurePosixPath(path) for path in KERNEL_ORDER]
    init, menu = named
    if init:
        evidence.append(f"{menu} starts the kernel with init={init}")
        # if the file of init= is missing, a kernel tries its own list, an initramfs stops
        starts.insert(0, init)
    for start in starts:
        real = _program_at(reader, start, evidence)
        if real is None:
            continue
        program, path = _identify(reader, start, real, evidence)
        if start == init and program in INCONCLUSIVE and _takes_itself_out(reader, real):
            evidence.append(f"{real} runs once and removes itself from the command line")
            continue
        return Pid1(program=program, path=path, evidence=tuple(evidence))
    evidence.append(f"none of {', '.join(str(start) for start in starts)} can be started")
    return _unseen(reader, starts, evidence)


def _takes_itself_out(reader: GuestReader, path: PurePosixPath) -> bool:
    """Return whether a program edits the command line that starts it.

    Raspberry Pi OS enlarges its filesystem this way at the first boot; later boots
    start the usual init.
    """
    content = reader.read(path, limit=SCRIPT_LIMIT)
    return content.startswith(b"#!") and b"cmdline.txt" in content and b"init=" in content


def _unseen(reader: GuestReader, starts: list[PurePosixPath], evidence: list[str]) -> Pid1:
    """Return what would start if missing files existed and missing execute bits were set.

    A tree may be a part of a guest: links without their targets, or files without their
    modes. A complete guest that looks like this does not boot.
    """
    if reader.lstat(PurePosixPath("/sbin")) is None:
        starts = [*starts, *(PurePosixPath(path) for path in MERGED)]
    for start in starts:
        real = follow(reader, start)
        if real is None:
            continue
        status = reader.lstat(real)
        if status is not None and status.kind == "file":
            program, path = _identify(reader, start, real, evidence)
        elif status is None and (named := _by_name(real)):
            program, path = named, real
        else:
            continue
        if program not in INCONCLUSIVE:
            evidence.append(f"{start} leads to {real}, which would be {program}")
            return Pid1(program=program, path=path, evidence=tuple(evidence), is_seen=False)
    return Pid1(program="none", path=None, evidence=tuple(evidence))


def _program_at(
    reader: GuestReader, start: PurePosixPath, evidence: list[str]
) -> PurePosixPath | None:
    """Return the real path of the program at this path, or None if the kernel cannot start it."""
    real = follow(reader, start)
    if real is None:
        evidence.append(f"{start} leads through a circle of links")
        return None
    status = reader.lstat(real)
    if status is None and real == start:
        return None
    if real != start:
        evidence.append(f"{start} leads to {real}")
    if status is None:
        evidence.append(f"{real} is not there; is /usr on a filesystem of its own?")
        return None
    if status.kind != "file" or not status.mode & EXECUTABLE:
        evidence.append(f"{real} is not an executable file")
        return None
    return real


def _identify(
    reader: GuestReader,
    start: PurePosixPath,
    real: PurePosixPath,
    evidence: list[str],
    depth: int = SCRIPT_DEPTH,
) -> tuple[str, PurePosixPath]:
    """Identify a program and its path; for a script, the program that it executes."""
    program = _by_name(real)
    if program and not (program == "shell" and start.name == "init"):
        return program, real
    content = reader.read(real, limit=PROGRAM_LIMIT)
    if content.startswith(b"#!"):
        return _identify_script(reader, content, real, evidence, depth)
    for package, program in _BY_PACKAGE.items():
        if _owns(reader, package, (start, real)):
            evidence.append(f"{start} belongs to the package {package}")
            return program, real
    for words, program in _BY_CONTENT:
        if words in content:
            evidence.append(f"{real} contains {words.decode()!r}")
            return program, real
    evidence.append(f"nothing identifies the program {real}")
    return "unknown", real


def _by_name(path: PurePosixPath) -> str | None:
    """Identify a program by its name; BusyBox appends its variants' names to its own."""
    return "busybox" if path.name.startswith("busybox") else _BY_NAME.get(path.name)


def _identify_script(
    reader: GuestReader, content: bytes, real: PurePosixPath, evidence: list[str], depth: int
) -> tuple[str, PurePosixPath]:
    if b"s6-linux-init" in content:
        evidence.append(f"{real} is a script that starts s6-linux-init")
        return "s6", real
    found: dict[str, tuple[PurePosixPath, list[str]]] = {}
    for path in _successors(content) if depth else ():
        sentences: list[str] = []
        target = _program_at(reader, path, sentences)
        if target is None or target == real:
            continue
        program, where = _identify(reader, path, target, sentences, depth - 1)
        if program not in INCONCLUSIVE:
            found.setdefault(program, (where, sentences))
    if _executes_svscan(content):
        found["s6"] = (real, [])  # the script says which directory s6-svscan watches
    if len(found) == 1:
        program, (where, sentences) = found.popitem()
        started = "s6-svscan" if where == real else where
        evidence += [f"{real} is a script that executes {started}", *sentences]
        return program, where
    names = f", which executes {' or '.join(found)}" if found else ""
    evidence.append(f"{real} is a script{names}")
    return "script", real


def _successors(content: bytes) -> list[PurePosixPath]:
    """Return the programs that a script may ``exec``: the absolute paths in such commands."""
    lines = without_comments(content[:SCRIPT_LIMIT].decode("utf-8", "replace"))
    commands = [match[1] for line in lines for match in _EXEC.finditer(line)]
    words = [word.strip("\"'") for command in commands for word in command.split()]
    paths = list(dict.fromkeys(word for word in words if _PROGRAM.fullmatch(word)))
    return [PurePosixPath(printable(path)) for path in paths[:SUCCESSORS_LIMIT]]


def _executes_svscan(content: bytes) -> bool:
    """Return whether a script executes s6-svscan(8), by a shell's ``exec`` or in execlineb(1)."""
    text = content[:SCRIPT_LIMIT].decode("utf-8", "replace")
    lines = without_comments(text)
    if "execlineb" in text.split("\n", 1)[0]:
        return any(_SVSCAN.search(line) for line in lines)
    return any(_SVSCAN.search(match[1]) for line in lines for match in _EXEC.finditer(line))


def _owns(reader: GuestReader, package: str, paths: tuple[PurePosixPath, ...]) -> bool:
    """Return whether this Debian package owns one of the paths, despite merged /usr."""
    listed = read_text(reader, PurePosixPath(f"/var/lib/dpkg/info/{package}.list"))
    if not listed:
        return False
    owned = set(listed.splitlines())
    names = {str(path) for path in paths} | {
        str(path).removeprefix("/usr") for path in paths if str(path).startswith("/usr/")
    }
    return bool(owned & names)
