"""Get MicroPython's source from Debian's source package.

apt fetches it with a private root from the mirror that this host itself uses, and
checks the archive's signature.  Its SHA-256 is pinned here as well, so a host without
such a mirror can use a copy from elsewhere.
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


def unpack_source(given: Path | None, directory: Path) -> Path:
    """Unpack MicroPython's source into a folder of an empty directory; return the folder.

    Args:
        given: the tarball, if the caller has it.
        directory: the empty directory.

    Raises:
        BundledRuntimeError: the source cannot be fetched, or is a different one.
    """
    tarball = directory / TARBALL
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
            f"{given or tarball.name} is not Debian's source of MicroPython {VERSION}: its SHA-256 "
            f"is {found}"
        )
    source = directory / "source"
    source.mkdir()
    run(
        ["tar", "--extract", "--xz", "--strip-components=1", "--file", tarball],
        folder=source,
        timeout=UNPACK_SECONDS,
    )
    return source


def _fetch(tarball: Path) -> None:
    mirrors = host_mirrors(SUITE, updates=False)
    elsewhere = f"get {TARBALL} from a Debian mirror and give its path with --source"
    if not mirrors:
        raise BundledRuntimeError(
            "this host has no Debian mirror to fetch the source of MicroPython from",
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
            f"Debian {SUITE} now has another version of MicroPython", hint=elsewhere
        )


def _private_apt(root: Path, mirrors: list[str]) -> list[str]:
    """Return an apt-get that uses only these mirrors and writes only below the root."""
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
        "APT::Sandbox::User": "root",  # apt's own user may not reach the directory
        "Debug::NoLocking": "1",
    }
    return ["apt-get", *(f"-o{name}={value}" for name, value in options.items())]
