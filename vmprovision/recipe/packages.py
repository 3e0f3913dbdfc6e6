"""Make the guest's files from Debian packages, with mmdebstrap(1) and the host's apt settings.

On a Debian host the packages come from the mirror that the host itself uses: it is
near, the firewall allows it, and it may be a pinned one.  mmdebstrap ignores the
host's ``apt.conf``, so the settings that the mirror needs are passed on; none of them
stays in the image.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.errors import CommandError, RecipeError
from vmprovision.host.command import run
from vmprovision.host.mirrors import APT_SECONDS, host_mirrors
from vmprovision.recipe.emulation import require_emulation

if TYPE_CHECKING:
    from vmprovision.progress import Control
    from vmprovision.recipe.schema import Recipe

BUILD_SECONDS = 3600.0
UNSHARE_SECONDS = 60.0
# mmdebstrap gives no file a later date.  With SOURCE_DATE_EPOCH, Python writes bytecode
# that does not depend on dates either.
SOURCE_DATE_EPOCH = "1767225600"  # 2026-01-01

KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
# Settings of the host's apt.conf that decide whether its mirror can be used.
_PASSED_ON = re.compile(
    r"Acquire::("
    r"Check-Valid-Until|Check-Date|Max-FutureTime|Retries|ForceIPv4|ForceIPv6"
    r"|https?::(Proxy(::[^ ]+)?|Proxy-Auto-Detect|Timeout|Pipeline-Depth)"
    r"|https::(Verify-Peer|Verify-Host|CaInfo)(::[^ ]+)?"
    r') "[^"]+";'
)
# Files that would reveal the host that built the guest.
HOST_FILES = (
    "/etc/apt/apt.conf.d/99mmdebstrap",
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d/0000mmdebstrap.list",
    "/etc/apt/sources.list.d/0000mmdebstrap.sources",
)


def make_guest_files(recipe: Recipe, target: Path, control: Control | None = None) -> None:
    """Write a tar archive of all files of the guest to ``target``.

    Raises:
        RecipeError: the packages could not be fetched or installed.
        CancelledError: the caller cancelled.
    """
    if not any(keyring.exists() for keyring in KEYRINGS):
        raise RecipeError(
            "this host lacks the keys of the Debian archive",
            hint="install the package debian-archive-keyring",
        )
    require_emulation(recipe.architecture)
    files = target.with_suffix(".files.tar")
    files.write_bytes(pack_files(recipe))
    enter, place = _removed_with(target.parent)
    try:
        run(
            [*enter, *mmdebstrap_command(recipe, files=files, target=target)],
            timeout=BUILD_SECONDS,
            environment={"SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH, **place},
            cancelled=control.cancelled if control else None,
        )
    except CommandError as exc:
        raise RecipeError(f"recipe {recipe.name}: {_cause(exc)}", hint=_hint(exc)) from exc
    finally:
        files.unlink(missing_ok=True)


def _removed_with(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return what lets mmdebstrap's mounts and folder disappear with it and with this folder.

    As root it mounts in the host's namespace, and it does not unmount when it is ended.
    As another user it mounts in a namespace of its own, and it removes its folder, which
    belongs to users that this process cannot act as.
    """
    own_mounts = ["unshare", "--mount"]
    if os.geteuid() != 0:
        return [], {}
    try:
        run([*own_mounts, "mmdebstrap", "--version"], timeout=UNSHARE_SECONDS)
    except CommandError:  # mmdebstrap is missing, or mounts nothing in a container
        own_mounts = []
    return own_mounts, {"TMPDIR": str(folder)}


def mmdebstrap_command(recipe: Recipe, *, files: Path, target: Path) -> list[str | Path]:
    """Return the mmdebstrap command for a recipe, with this host's mirrors and apt settings."""
    command: list[str | Path] = ["mmdebstrap", "--quiet", "--format=tar"]
    command += [f"--variant={recipe.variant}", f"--architectures={','.join(recipe.architectures)}"]
    command += ['--aptopt=APT::Install-Recommends "false"']
    command += [f"--aptopt={setting}" for setting in host_apt_settings()]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.leave_out]
    command += [f"--dpkgopt=path-include={pattern}" for pattern in recipe.keep]
    packages = [name for name in (recipe.kernel, *recipe.packages) if name]
    if packages:
        command += [f"--include={','.join(packages)}"]
    # mmdebstrap has no later stage if packages are not installed
    stage = "extract" if recipe.variant == "extract" else "customize"
    # mmdebstrap copies these two from the host
    command += [f'--{stage}-hook=rm -f "$1/etc/hostname" "$1/etc/resolv.conf"']
    command += [f"--{stage}-hook=tar-in {shlex.quote(str(files))} /"]
    if recipe.customise:
        command += [f"--{stage}-hook={_customise_hook(recipe)}"]
    return [*command, recipe.suite, target, *host_mirrors(recipe.suite, updates=recipe.updates)]


def _customise_hook(recipe: Recipe) -> str:
    """Return the recipe's script as a hook, for a shell inside the guest's root to read."""
    end = "END-OF-RECIPE"
    return f"chroot \"$1\" {recipe.shell} -eu <<'{end}'\n{recipe.customise}\n{end}\n"


def pack_files(recipe: Recipe) -> bytes:
    """Return the recipe's ``files/`` as a tar archive, the same on every host.

    Root owns all files; those that begin with ``#!`` are executable.  Modes of the
    checkout are not used: they depend on its umask and are lost in packaging.
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
    """Return this host's proxy and validity settings as lines of ``apt.conf(5)``."""
    try:
        printed = run(["apt-config", "dump"], timeout=APT_SECONDS).stdout
    except CommandError:
        return []  # no apt here
    return [line for line in printed.splitlines() if _PASSED_ON.fullmatch(line)]


def _cause(exc: CommandError) -> str:
    """Return the useful part of mmdebstrap's errors: the first one and the lines before it."""
    # Perl warns of every script with a line break in it
    noise = "Unsuccessful stat on filename"
    lines = [line for line in exc.stderr.splitlines() if line.strip() and noise not in line]
    first = next((at for at, line in enumerate(lines) if line.startswith("E: ")), len(lines))
    return "; ".join([*lines[max(0, first - 3) : first], *lines[first : first + 1]]) or exc.message


def _hint(exc: CommandError) -> str:
    if exc.is_missing:
        return "install the package mmdebstrap"
    if "arch-test" in exc.stderr:
        return "install the package arch-test"
    if "NO_PUBKEY" in exc.stderr:
        return "install a newer debian-archive-keyring"
    if "uid_map" in exc.stderr or "subuid" in exc.stderr:
        return "as a normal user this needs the package uidmap and a line in /etc/subuid"
    if "Failed to fetch" in exc.stderr or "Could not resolve" in exc.stderr:
        return "check with `apt-get update` that the host's mirrors are reachable"
    return ""
