"""Find out what a guest is, without writing to it or running anything of it.

``inspect_guest`` is one pipeline of named steps. Each step returns facts with their
evidence.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from vmprovision.disklayout.subvolumes import split_subvolume
from vmprovision.errors import printable
from vmprovision.filesystem.elf import elf_abi, elf_architecture, read_elf_header
from vmprovision.guest.facts import GuestInfo
from vmprovision.initsystem import find_hints, judge_init
from vmprovision.inspection.distribution import inspect_distribution
from vmprovision.inspection.firstboot import find_first_boot
from vmprovision.inspection.generated import as_generated, find_generator
from vmprovision.inspection.installed import find_agent
from vmprovision.inspection.interpreters import find_interpreters
from vmprovision.inspection.layout import find_circles, find_kernels, find_links
from vmprovision.inspection.pid1 import find_pid1
from vmprovision.inspection.selinux import inspect_selinux
from vmprovision.inspection.watched import WatchedReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitSystem
    from vmprovision.mounts import HiddenMount

NOTES_LIMIT = 20
NOTE_LIMIT = 300  # characters


PROGRAMS = ("/bin/sh", "/bin/busybox", "/bin/ls", "/usr/bin/python3", "/usr/bin/python")


def inspect_guest(
    reader: GuestReader,
    *,
    init: InitSystem | None = None,
    mountpoints: Mapping[str, str] | None = None,
    hidden: Sequence[HiddenMount] = (),
    notes: Sequence[str] = (),
) -> GuestInfo:
    """Return all facts about a guest that a plan depends on.

    Args:
        reader: the guest's files.
        init: the init system, if the caller overrides the verdict.
        mountpoints: the guest's mountpoints that are mounted in the appliance.
        hidden: other mounts of the guest, over directories that will be written to.
        notes: notes from mounting the guest.

    Raises:
        InspectionError: the files cannot be read or the evidence contradicts itself.
        UnsupportedGuestError: the guest must not be written to offline.
    """
    reader = WatchedReader(reader)
    distribution = inspect_distribution(reader)
    pid1 = find_pid1(reader, _root_subvolume(mountpoints or {}))
    if generator := find_generator(reader, distribution, pid1):
        distribution, verdict = as_generated(generator, distribution, pid1)
    else:
        verdict = judge_init(reader, pid1, override=init)
    if verdict.system is None:  # the user has to choose, so list the candidates
        verdict = replace(verdict, hints=find_hints(reader, pid1, verdict))
    header = _userland(reader, pid1.path)
    arch = elf_architecture(header) or "unknown"
    interpreters = find_interpreters(reader, arch)
    agent = find_agent(reader, pid1)
    claims = agent.notes if agent else ()
    return GuestInfo(
        distribution=distribution,
        arch=arch,
        abi=elf_abi(header),
        libc=_libc(reader),
        init=verdict,
        interpreters=interpreters,
        kernels=find_kernels(reader),
        first_boot=find_first_boot(reader),
        selinux=inspect_selinux(reader),
        agent=agent,
        links=find_links(reader, *([verdict.hook] if verdict.hook else [])),
        circles=find_circles(reader),
        mountpoints=dict(mountpoints or {}),
        hidden=tuple(hidden),
        seals=pid1.seals,
        notes=limited(
            [
                *(f"{each.place} is sealed: {each.origin}" for each in pid1.seals),
                *(each.sentence for each in hidden),
                *notes,
                *claims,
            ]
        ),
    )


def limited(notes: Iterable[str]) -> tuple[str, ...]:
    """Return the notes for a person: each once, few, short and printable."""
    kept: dict[str, None] = {}
    for note in notes:
        short = note if len(note) <= NOTE_LIMIT else f"{note[: NOTE_LIMIT - 1]}…"
        kept.setdefault(printable(short))
    shown = list(kept)[:NOTES_LIMIT]
    if len(kept) > NOTES_LIMIT:
        shown.append(f"and {len(kept) - NOTES_LIMIT} more notes")
    return tuple(shown)


def explain_init(reader: GuestReader, guest: GuestInfo) -> GuestInfo:
    """Return the guest with the evidence for each init system, as ``init.hints``."""
    reader = WatchedReader(reader)
    pid1 = find_pid1(reader, _root_subvolume(guest.mountpoints))
    hints = find_hints(reader, pid1, guest.init)
    return replace(guest, init=replace(guest.init, hints=hints))


def _root_subvolume(mountpoints: Mapping[str, str]) -> str:
    """Return the btrfs subvolume that is mounted as the root, or ""."""
    return split_subvolume(mountpoints.get("/", ""))[1] or ""


def _userland(reader: GuestReader, pid1: PurePosixPath | None) -> bytes:
    """Return the ELF header of PID 1, else of a shell or a Python; empty if there is none."""
    candidates = [pid1] if pid1 else []
    for path in (*candidates, *(PurePosixPath(name) for name in PROGRAMS)):
        if header := read_elf_header(reader, path):
            return header
    return b""


def _libc(reader: GuestReader) -> Literal["glibc", "musl", "unknown"]:
    names = reader.list_directory(PurePosixPath("/lib"))
    if any(name.startswith("ld-musl-") for name in names):
        return "musl"
    names += reader.list_directory(PurePosixPath("/lib64"))
    if any(name.startswith(("ld-linux", "ld64.so", "ld.so", "ld-2.")) for name in names):
        return "glibc"
    return "unknown"
