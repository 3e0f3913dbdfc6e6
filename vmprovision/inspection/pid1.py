"""Which program the guest's kernel starts as process 1, and how that is known.

Directories mislead (``/etc/systemd`` stands on Upstart guests, ``/etc/init.d`` on
systemd's), so the kernel's own way is followed: ``init=`` on the command line
that the boot loader gives (kernel-command-line(7)), else the first of the four
paths that the kernel tries (``init/main.c``), through the guest's links; then
what that file is, by name, by package owner, by what it contains.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.errors import InspectionError, printable
from vmprovision.filesystem import read_text, resolve
from vmprovision.guest import Pid1

if TYPE_CHECKING:
    from vmprovision.filesystem import GuestReader

KERNEL_ORDER = ("/sbin/init", "/etc/init", "/bin/init", "/bin/sh")
PROGRAM_LIMIT = 8 << 20
EXECUTABLE = 0o111
SCRIPT_DEPTH = 4
SCRIPT_LIMIT = 64 << 10

# Each holds the command line of the entry that boots unless a person chooses another.
BOOT_FILES = (
    "/boot/grub/grub.cfg",
    "/boot/grub2/grub.cfg",
    "/boot/efi/EFI/debian/grub.cfg",
    "/boot/extlinux/extlinux.conf",
    "/boot/syslinux/syslinux.cfg",
    "/boot/extlinux.conf",
    "/extlinux.conf",
    "/boot/grub/menu.lst",
    "/boot/grub/grub.conf",
    "/etc/kernel/cmdline",
)
BOOT_ENTRIES = ("/boot/loader/entries", "/boot/efi/loader/entries", "/efi/loader/entries")

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
# What only the program itself contains, most telling first: BusyBox knows
# /etc/inittab as sysvinit does, and Upstart's telinit speaks of both.
_BY_CONTENT = (
    (b"BusyBox v", "busybox"),
    (b"com.ubuntu.Upstart", "upstart"),
    (b"/etc/dinit.d", "dinit"),
    (b"/etc/finit.conf", "finit"),
    (b"/etc/runit/", "runit"),
    (b"/etc/preinit", "procd"),
    (b"OpenRC init", "openrc-init"),
    (b"org.freedesktop.systemd1", "systemd"),
    (b"/etc/inittab", "sysvinit"),
)


def find_pid1(reader: GuestReader) -> Pid1:
    """The program that the guest's kernel starts."""
    evidence: list[str] = []
    for start in _starting_points(reader, evidence):
        real = _program_at(reader, start, evidence)
        if real is None:
            continue
        program, path = _identify(reader, start, real, evidence)
        return Pid1(program=program, path=path, evidence=tuple(evidence))
    evidence.append(f"none of {', '.join(KERNEL_ORDER)} is there")
    return Pid1(program="none", path=None, evidence=tuple(evidence))


def _program_at(
    reader: GuestReader, start: PurePosixPath, evidence: list[str]
) -> PurePosixPath | None:
    """Where the program that the kernel starts by this path really is; None: it cannot start it."""
    try:
        real = resolve(reader, start)
    except InspectionError:
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
        evidence.append(f"{real} is no executable file")
        return None
    return real


def _starting_points(reader: GuestReader, evidence: list[str]) -> list[PurePosixPath]:
    named = kernel_option(reader)
    if named is None:
        return [PurePosixPath(path) for path in KERNEL_ORDER]
    path, source = named
    evidence.append(f"{source} starts the kernel with init={path}")
    # a kernel whose init= is missing tries its own list; an initramfs stops instead
    return [path, *(PurePosixPath(path) for path in KERNEL_ORDER)]


def kernel_option(reader: GuestReader) -> tuple[PurePosixPath, PurePosixPath] | None:
    """The ``init=`` that the guest's boot loader passes, and the file that says so."""
    for name in BOOT_FILES:
        path = PurePosixPath(name)
        text = read_text(reader, path)
        if text and (found := _option_in(default_entry(text))):
            return found, path
    for folder in BOOT_ENTRIES:
        names = [n for n in reader.list_directory(PurePosixPath(folder)) if n.endswith(".conf")]
        found_in = {}
        for name in names:
            path = PurePosixPath(folder) / name
            found_in[path] = _option_in(read_text(reader, path) or "")
        values = set(found_in.values())
        if len(values) == 1 and (value := values.pop()):
            return value, next(iter(found_in))
    return None


def default_entry(text: str) -> str:
    """The part of a boot loader's configuration that boots by default: all up to a second entry.

    GRUB's and syslinux's first entry is the default one unless a person or
    ``grub-set-default`` chose another; the later ones are older kernels,
    recovery modes and, on Debian, the init systems that were replaced.
    """
    starts = [
        m.start()
        for m in re.finditer(r"(?m)^\s*(?:menuentry|title|label|submenu)\s", text, re.IGNORECASE)
    ]
    return text[: starts[1]] if len(starts) > 1 else text


def _option_in(text: str) -> PurePosixPath | None:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    match = re.search(r'(?:^|[\s"\'])init=(/[^\s"\']+)', "\n".join(lines))
    return PurePosixPath(printable(match[1])) if match else None


def _identify(
    reader: GuestReader,
    start: PurePosixPath,
    real: PurePosixPath,
    evidence: list[str],
    depth: int = SCRIPT_DEPTH,
) -> tuple[str, PurePosixPath]:
    """What a program is, and where: for a script, what it hands over to."""
    name = real.name
    if name.startswith("busybox"):
        return "busybox", real
    if name in _BY_NAME and not (_BY_NAME[name] == "shell" and start.name == "init"):
        return _BY_NAME[name], real
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
        if program not in ("shell", "unknown", "script"):
            found.setdefault(program, (where, sentences))
    if len(found) == 1:
        program, (where, sentences) = found.popitem()
        evidence += [f"{real} is a script that hands over to {where}", *sentences]
        return program, where
    names = f", which hands over to {' or '.join(found)}" if found else ""
    evidence.append(f"{real} is a script{names}")
    return "script", real


def _successors(content: bytes) -> list[PurePosixPath]:
    """Programs that a script may ``exec``: the absolute paths in such commands."""
    text = content[:SCRIPT_LIMIT].decode("utf-8", "replace")
    commands = re.findall(r"(?m)^[^#\n]*\bexec\s+([^\n;&|]*)", text)
    words = [word.strip("\"'") for command in commands for word in command.split()]
    paths = dict.fromkeys(word for word in words if re.match(r"/(?!dev/|proc/)[\w./+-]+$", word))
    return [PurePosixPath(printable(path)) for path in paths]


def _owns(reader: GuestReader, package: str, paths: tuple[PurePosixPath, ...]) -> bool:
    """Whether Debian's dpkg has this package own one of the paths (usr-merge aside)."""
    listed = read_text(reader, PurePosixPath(f"/var/lib/dpkg/info/{package}.list"))
    if not listed:
        return False
    owned = set(listed.splitlines())
    names = {str(path) for path in paths} | {
        str(path).removeprefix("/usr") for path in paths if str(path).startswith("/usr/")
    }
    return bool(owned & names)
