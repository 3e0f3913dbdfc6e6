"""s6: a service directory that s6-svscan watches, else lines in ``/etc/s6/rc.local``.

s6-linux-init(8), s6-svscan(8), s6-supervise(8).  The database of s6-rc is compiled by a
program of the guest, which cannot run offline, so that database stays unchanged.  s6-svscan
is process 1 with s6-rc as without it, and runs what is in its directory.  Whether ``rc.local``
runs is in the database: Artix has a service for it, which its user may not have enabled.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.changes.operations import Operation, WriteFile
from vmprovision.filesystem.protocol import follow, read_text, resolved_file
from vmprovision.guest.shelltext import without_comments
from vmprovision.initsystem.bootscript import loop_in_script
from vmprovision.initsystem.definition import Definition, Evidence, Supervisor, Variant
from vmprovision.initsystem.markers import Markers
from vmprovision.initsystem.rendering import render

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import InitVerdict, Pid1
    from vmprovision.initsystem.rendering import Service

RC_LOCAL = PurePosixPath("/etc/s6/rc.local")
# s6-linux-init(8) copies its `run-image` to /run, where s6-svscan watches `service`.
BASE = PurePosixPath("/etc/s6-linux-init/current")
SCANDIR = BASE / "run-image/service"
COPIERS = ("cp", "s6-hiercopy", "rsync")
COPIED_LIMIT = 16
VOLATILE = (("dev",), ("run",), ("tmp",))  # in memory: made anew at each boot


def detect(reader: GuestReader, pid1: Pid1) -> Evidence | None:
    """Return evidence if s6-linux-init is process 1 and a place without compilation exists."""
    if pid1.program != "s6":
        return None
    starts = f"{pid1.path} starts s6"
    if scandir := _find_scandir(reader, pid1):
        return Evidence((starts, f"{scandir} is what s6-svscan watches once it is copied to /run"))
    if hook := resolved_file(reader, RC_LOCAL):
        return Evidence((starts, f"{hook} is there for commands to run at boot"), "likely")
    return None


def complete(reader: GuestReader, pid1: Pid1, verdict: InitVerdict) -> InitVerdict:
    """Return the verdict with the directory that s6-svscan watches, else with ``rc.local``."""
    scandir = _find_scandir(reader, pid1)
    return replace(
        verdict,
        hook=scandir or follow(reader, RC_LOCAL) or RC_LOCAL,
        dialect="scandir" if scandir else "rc.local",
    )


def _find_scandir(reader: GuestReader, pid1: Pid1) -> PurePosixPath | None:
    """Return the directory on disk that s6-svscan watches, or whose copy in /run it watches."""
    script = (read_text(reader, pid1.path) if pid1.path else None) or ""
    watched = _watched(script)
    if watched and (path := _on_disk(reader, watched)):
        return path
    base = _named_base(script)
    copied = [] if base else _copied(script, watched or SCANDIR)
    usual = (base or BASE) / "run-image/service"
    return next((path for each in (*copied, usual) if (path := _on_disk(reader, each))), None)


def _on_disk(reader: GuestReader, path: PurePosixPath) -> PurePosixPath | None:
    """Return the real path of a directory that is still there at the next boot."""
    real = follow(reader, path)
    status = reader.lstat(real) if real and real.parts[1:2] not in VOLATILE else None
    return real if status is not None and status.kind == "directory" else None


def _copied(script: str, watched: PurePosixPath) -> list[PurePosixPath]:
    """Return what an init script may copy to the directory that s6-svscan watches."""
    lines = [[word.strip("\"'") for word in line.split()] for line in without_comments(script)]
    words = [word for line in lines if any(_is_copier(w) for w in line) for word in line]
    places = [PurePosixPath(word) for word in words if word.startswith("/")][:COPIED_LIMIT]
    return [place if place.name == watched.name else place / watched.name for place in places]


def _is_copier(word: str) -> bool:
    return PurePosixPath(word).name in COPIERS


def _watched(script: str) -> PurePosixPath | None:
    """Return the directory that an init script gives to s6-svscan."""
    for line in without_comments(script):
        words = [word.strip("\"'") for word in line.split()]
        for at, word in enumerate(words):
            if PurePosixPath(word).name == "s6-svscan":
                return next((PurePosixPath(w) for w in words[at + 1 :] if w.startswith("/")), None)
    return None


def _named_base(script: str) -> PurePosixPath | None:
    """Return the directory that an init script gives to s6-linux-init with ``-c``."""
    for line in without_comments(script):
        _, called, rest = line.partition("s6-linux-init ")
        words = [word.strip("\"'") for word in rest.split()] if called else []
        for word, following in pairwise([*words, ""]):
            value = following if word == "-c" else word.removeprefix("-c")
            if word.startswith("-c") and value.startswith("/"):
                return PurePosixPath(value)
    return None


def service_operations(service: Service, verdict: InitVerdict) -> list[Operation]:
    """Return the block in rc.local, or the one script of a service directory."""
    if verdict.dialect != "scandir":
        return [loop_in_script(verdict.hook or RC_LOCAL, service)]
    return [
        WriteFile(
            path=(verdict.hook or SCANDIR) / service.name / "run",
            content=render("s6/run.j2", service=service),
            mode=0o755,
        )
    ]


DEFINITION = Definition(
    name="s6",
    variants=(
        Variant(dialect="scandir", hook=SCANDIR, supervisor=Supervisor(parents=("s6-supervise",))),
        Variant(dialect="rc.local", hook=RC_LOCAL),
    ),
    markers=Markers(
        programs=("/usr/bin/s6-linux-init", "/bin/s6-linux-init"),
        files=(str(RC_LOCAL),),
        folders=(str(BASE),),
    ),
    detect=detect,
    complete=complete,
    service_operations=service_operations,
)
