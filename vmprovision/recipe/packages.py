"""The guest's files, from Debian packages: mmdebstrap(1) and the host's own apt settings.

The packages come from the mirror that this host itself uses, where it is a
Debian host: it is near, it is allowed through the firewall, and it may be a
pinned one.  mmdebstrap reads nothing of the host's ``apt.conf``, so what decides
whether that mirror can be reached is passed on; nothing of it stays in the image.
"""

from __future__ import annotations

import io
import re
import shlex
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.errors import CommandError, RecipeError
from vmprovision.host.command import run
from vmprovision.host.mirrors import APT_SECONDS, host_mirrors

if TYPE_CHECKING:
    from vmprovision.recipe.schema import Recipe

BUILD_SECONDS = 3600.0
# mmdebstrap gives no file a later date.  Python notices SOURCE_DATE_EPOCH too, and
# then makes bytecode that does not depend on dates.
SOURCE_DATE_EPOCH = "1767225600"  # 2026-01-01

KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
# What of the host's apt.conf decides whether its mirror can be used.
_PASSED_ON = re.compile(
    r"Acquire::("
    r"Check-Valid-Until|Check-Date|Max-FutureTime|Retries|ForceIPv4|ForceIPv6"
    r"|https?::(Proxy(::[^ ]+)?|Proxy-Auto-Detect|Timeout|Pipeline-Depth)"
    r"|https::(Verify-Peer|Verify-Host|CaInfo)(::[^ ]+)?"
    r') "[^"]+";'
)
# Files by which the guest would tell of the host that built it.
HOST_TRACES = (
    "/etc/apt/apt.conf.d/99mmdebstrap",
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d/0000mmdebstrap.list",
    "/etc/apt/sources.list.d/0000mmdebstrap.sources",
)


def make_guest_files(recipe: Recipe, target: Path) -> None:
    """Write a tar archive with all files of the guest to ``target``.

    Raises:
        RecipeError: the packages could not be had or did not install.
    """
    if not any(keyring.exists() for keyring in KEYRINGS):
        raise RecipeError(
            "this host does not know the keys of the Debian archive",
            hint="install the package debian-archive-keyring",
        )
    files = target.with_suffix(".files.tar")
    files.write_bytes(pack_files(recipe))
    try:
        run(
            mmdebstrap_command(recipe, files=files, target=target),
            timeout=BUILD_SECONDS,
            environment={"SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH},
        )
    except CommandError as exc:
        raise RecipeError(f"recipe {recipe.name}: {_cause(exc)}", hint=_hint(exc)) from exc
    finally:
        files.unlink(missing_ok=True)


def mmdebstrap_command(recipe: Recipe, *, files: Path, target: Path) -> list[str | Path]:
    """The mmdebstrap command line for a recipe, with this host's mirrors and apt settings."""
    command: list[str | Path] = ["mmdebstrap", "--quiet", "--format=tar"]
    command += [f"--variant={recipe.variant}", f"--architectures={recipe.architecture}"]
    command += ['--aptopt=APT::Install-Recommends "false"']
    command += [f"--aptopt={setting}" for setting in host_apt_settings()]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.leave_out]
    command += [f"--dpkgopt=path-include={pattern}" for pattern in recipe.keep]
    if recipe.packages:
        command += [f"--include={','.join(recipe.packages)}"]
    # mmdebstrap has no later stage where packages are not installed
    stage = "extract" if recipe.variant == "extract" else "customize"
    # mmdebstrap copies these two from the host
    command += [f'--{stage}-hook=rm -f "$1/etc/hostname" "$1/etc/resolv.conf"']
    command += [f"--{stage}-hook=tar-in {shlex.quote(str(files))} /"]
    if recipe.customise:
        command += [f"--{stage}-hook={_customise_hook(recipe)}"]
    return [*command, recipe.suite, target, *host_mirrors(recipe.suite, updates=recipe.updates)]


def _customise_hook(recipe: Recipe) -> str:
    """The recipe's script as a hook: read by a shell inside the guest's root."""
    end = "END-OF-RECIPE"
    return f"chroot \"$1\" {recipe.shell} -eu <<'{end}'\n{recipe.customise}\n{end}\n"


def pack_files(recipe: Recipe) -> bytes:
    """The recipe's ``files/`` as a tar archive, the same on every host.

    All belongs to root; what begins with ``#!`` can be executed.  Modes of the
    checkout are not used: they depend on its umask and get lost in packaging.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for place, path in recipe.files().items():
            content = path.read_bytes()
            member = tarfile.TarInfo(place)
            member.size = len(content)
            member.mtime = int(SOURCE_DATE_EPOCH)
            member.mode = 0o755 if content.startswith(b"#!") else 0o644
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def host_apt_settings() -> list[str]:
    """Proxy and validity settings of this host, as lines of ``apt.conf(5)``."""
    try:
        printed = run(["apt-config", "dump"], timeout=APT_SECONDS).stdout
    except CommandError:
        return []  # no apt here
    return [line for line in printed.splitlines() if _PASSED_ON.fullmatch(line)]


def _cause(exc: CommandError) -> str:
    """What a person wants to know of mmdebstrap's errors: what was said just before the first."""
    # Perl warns of every script with a line break in it
    noise = "Unsuccessful stat on filename"
    lines = [line for line in exc.stderr.splitlines() if line.strip() and noise not in line]
    first = next((at for at, line in enumerate(lines) if line.startswith("E: ")), len(lines))
    return "; ".join([*lines[max(0, first - 3) : first], *lines[first : first + 1]]) or exc.message


def _hint(exc: CommandError) -> str:
    if "is not installed" in exc.message:
        return "install the package mmdebstrap"
    if "NO_PUBKEY" in exc.stderr:
        return "install a newer debian-archive-keyring"
    if "uid_map" in exc.stderr or "subuid" in exc.stderr:
        return "as a normal user this needs the package uidmap and a line in /etc/subuid"
    if "Failed to fetch" in exc.stderr or "Could not resolve" in exc.stderr:
        return "are the host's mirrors reachable? `apt-get update` tells"
    return ""
