"""Find the host's kernels, with which libguestfs's appliance is built and KVM is tested.

supermin(1) uses the newest kernel in ``/boot`` whose modules are installed, or the one
that ``SUPERMIN_KERNEL`` names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

KERNEL_VARIABLE = "SUPERMIN_KERNEL"
MODULES_VARIABLE = "SUPERMIN_MODULES"
BOOT = Path("/boot")
MODULES = Path("/lib/modules")


def host_kernels() -> list[Path]:
    """Return the kernels that an appliance can be built with, the newest last."""
    if named := os.environ.get(KERNEL_VARIABLE):
        return [Path(named)]
    kernels = BOOT.glob("vmlinu[xz]-*")
    usable = [path for path in kernels if (MODULES / path.name.partition("-")[2]).is_dir()]
    return sorted(usable, key=_version)


def appliance_kernel() -> Path | None:
    """Return the newest kernel that this user can read, or None."""
    readable = [path for path in host_kernels() if os.access(path, os.R_OK)]
    return readable[-1] if readable else None


def modules_of(kernel: Path) -> Path:
    """Return the folder of a kernel's modules: as supermin(1) is told, or by the kernel's name."""
    named = os.environ.get(MODULES_VARIABLE)
    return Path(named) if named else MODULES / kernel.name.partition("-")[2]


def _version(kernel: Path) -> list[tuple[int, str]]:
    """Return a sort key that puts 6.10 after 6.9."""
    words = re.findall(r"\d+|\D+", kernel.name.partition("-")[2])
    return [(int(word), "") if word.isdigit() else (-1, word) for word in words]
