"""Check whether this host can run a guest's programs while its image is built.

A package's installation scripts are programs of the guest. For another processor the
kernel starts qemu-user(1), which must be registered in binfmt_misc once. The packages
do that if a service manager runs; otherwise ``update-binfmts --enable`` does.
"""

from __future__ import annotations

import platform
from pathlib import Path

from vmprovision.errors import RecipeError

REGISTERED = Path("/proc/sys/fs/binfmt_misc")
# Debian's name -> QEMU's
EMULATORS = {
    "amd64": "x86_64",
    "arm64": "aarch64",
    "armhf": "arm",
    "i386": "i386",
    "ppc64el": "ppc64le",
    "riscv64": "riscv64",
    "s390x": "s390x",
}
# `uname -m` -> the architectures, by Debian's names, whose programs such a host runs itself
NATIVE = {
    "x86_64": ("amd64", "i386"),
    "aarch64": ("arm64",),
    "armv7l": ("armhf",),
    "ppc64le": ("ppc64el",),
}


def require_emulation(architecture: str) -> None:
    """Check that this host can run programs of an architecture, given by Debian's name.

    Raises:
        RecipeError: it cannot; the hint names the packages to install.
    """
    machine = platform.machine()
    if architecture in NATIVE.get(machine, (machine,)):
        return
    name = f"qemu-{EMULATORS[architecture]}"
    if any(_is_enabled(REGISTERED / entry) for entry in (name, f"{name}-static")):
        return
    raise RecipeError(
        f"this host cannot run programs for {architecture}: {REGISTERED / name} is not enabled",
        hint="as root: apt-get install qemu-user-static binfmt-support arch-test"
        " && update-binfmts --enable",
    )


def _is_enabled(entry: Path) -> bool:
    """Return whether an emulator is registered, for processes with another root, too."""
    try:
        lines = entry.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags:")), "")
    return "enabled" in lines and "F" in flags.removeprefix("flags:")
