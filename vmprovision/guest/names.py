"""Names of init systems and architectures, as in ``GuestInfo`` and on the command line.

They are separate from the facts so that ``vmprovision --help`` can list them without
loading anything else.
"""

from __future__ import annotations

from typing import Literal, get_args

InitSystem = Literal[
    "systemd",
    "openrc",
    "sysv",
    "slackware",
    "upstart",
    "runit",
    "dinit",
    "s6",
    "finit",
    "procd",
    "busybox",
    "standalone",
]
INIT_SYSTEMS: tuple[InitSystem, ...] = get_args(InitSystem)

# Architectures that a runtime can be built for. ARM means ARMv5 or later, i386 an i486.
ARCHITECTURES = ("x86_64", "aarch64", "armv7l", "i386", "riscv64", "ppc64le", "s390x")
