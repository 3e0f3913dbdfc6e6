"""MicroPython's source, from Debian's source package.

apt fetches it with a private root: from the mirror that this host itself uses,
checked by the archive's signature.  What it must be is pinned here as well, so
a copy from elsewhere will do where the host has no such mirror.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from vmprovision.changes.conditions import digest
from vmprovision.errors import BundledRuntimeError, CommandError
from vmprovision.host.command import run
from vmprovision.host.mirrors import host_mirrors

if TYPE_CHECKING:
    from pathlib import Path

VERSION = "1.25.0"
PACKAGE = "micropython"
SUITE = "trixie"
TARBALL = f"{PACKAGE}_{VERSION}+ds.orig.tar.xz"
SHA256 = "7b25be99a502f070b2de81dafc08da7051d992325d6e67daa9045a918fffdbea"
FETCH_SECONDS = 600.0
UNPACK_SECONDS = 300.0


def unpack_source(given: Path | None, workshop: Path) -> Path:
    """The folder inside the workshop with MicroPython's source.

    Args:
        given: the tarball, where the caller has it.
        workshop: an empty folder.

    Raises:
        BundledRuntimeError: the source cannot be had, or is not the right one.
    """
    tarball = workshop / TARBALL
    if given is None:
        _fetch(tarball)
    else:
        try:
            shutil.copyfile(given, tarball)
        except OSError as exc:
            raise BundledRuntimeError(f"{given}: {exc.strerror}") from exc
    found = digest(tarball.read_bytes())
    if found != SHA256:
        raise BundledRuntimeError(
            f"{given or tarball.name} is not MicroPython {VERSION} as Debian has it: its SHA-256 "
            f"is {found}"
        )
    source = workshop / "source"
    source.mkdir()
    run(
        ["tar", "--extract", "--xz", "--strip-components=1", "--file", tarball],
        folder=source,
        timeout=UNPACK_SECONDS,
    )
    return source


def _fetch(tarball: Path) -> None:
    mirrors = host_mirrors(SUITE, updates=False)
    elsewhere = f"get {TARBALL} from a Debian mirror and name it with --source"
    if not mirrors:
        raise BundledRuntimeError(
            "this host gets no packages from Debian, whose source of MicroPython is needed",
            hint=elsewhere,
        )
    apt = _private_apt(tarball.with_name("apt"), mirrors)
    try:
        run([*apt, "update"], timeout=FETCH_SECONDS)
        run(
            [*apt, "source", "--download-only", "--tar-only", PACKAGE],
            folder=tarball.parent,
            timeout=FETCH_SECONDS,
        )
    except CommandError as exc:
        raise BundledRuntimeError(
            f"the source of MicroPython could not be fetched: {exc.message}", hint=elsewhere
        ) from exc
    if not tarball.exists():
        raise BundledRuntimeError(
            f"Debian {SUITE} has another version of MicroPython now", hint=elsewhere
        )


def _private_apt(root: Path, mirrors: list[str]) -> list[str]:
    """An apt-get that knows these mirrors and no others, and leaves nothing outside the root."""
    for folder in ("lists/partial", "archives/partial"):
        (root / folder).mkdir(parents=True)
    (root / "status").touch()
    lines = [line.replace("deb ", "deb-src ", 1) + "\n" for line in mirrors]
    (root / "sources.list").write_text("".join(lines), encoding="ascii")
    options = {
        "Dir::Etc::sourcelist": root / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": root,
        "Dir::State::status": root / "status",
        "Dir::Cache": root,
        "APT::Sandbox::User": "root",  # apt's own user may not reach the workshop
        "Debug::NoLocking": "1",
    }
    return ["apt-get", *(f"-o{name}={value}" for name, value in options.items())]
