"""Guest text that a careless parser never finishes.

The limits of ``limits.py`` are far above what such a guest needs: earlier parsers took
minutes, or never ended.
"""

from __future__ import annotations

from tests.hostile.guests import MB
from tests.trees import BUSYBOX_TREE, OS_RELEASE, SYSTEMD_TREE, Link, Program, Tree, elf
from vmprovision.changes.blocks import marked

SYSV: Tree = {
    "/etc/os-release": OS_RELEASE,
    "/etc/inittab": "l2:2:wait:/etc/init.d/rc 2\n",
    "/sbin/init": elf(content=b"INIT: version booting /etc/inittab"),
    "/bin/sh": elf(),
}
QUOTED = '"a" '
MENU = "menuentry 'a' {\n linux /v root=x\n}\n"
BEGIN = marked("guest-agent", b"").splitlines(keepends=True)[0]


def times(text: str) -> str:
    """Return about a megabyte of this text."""
    return text * (MB // len(text))


TEXTS: dict[str, Tree] = {
    "grubenv of blanks and a letter": {
        **SYSV,
        "/boot/grub/grub.cfg": "set default=$saved_entry\n" + MENU,
        "/boot/grub/grubenv": "a=" + times(" ") + "x",
    },
    "grubenv of tabs without a name": {
        **SYSV,
        "/boot/grub/grub.cfg": MENU,
        "/boot/grub/grubenv": "a" + times("\t") + "\n",
    },
    "a word in selinux/config": {**SYSV, "/etc/selinux/config": f"SELINUXTYPE={times('a')}\n"},
    "quotes in selinux/config": {**SYSV, "/etc/selinux/config": f"SELINUX={times(chr(39))}\n"},
    "a word as a title": {**SYSV, "/boot/grub/grub.cfg": f"menuentry {times('a')} {{\n}}\n" + MENU},
    "quotes as a title": {**SYSV, "/boot/grub/grub.cfg": f"menuentry {times(QUOTED)} {{\n}}\n"},
    "vendors that lead to one menu": {
        **SYSV,
        "/boot/efi/EFI/a/grub.cfg": times(MENU),
        **{f"/boot/efi/EFI/v{number}": Link("a") for number in range(300)},
    },
    "vendors with a menu each": {
        **SYSV,
        **{f"/boot/efi/EFI/v{number}/grub.cfg": MENU * 3000 for number in range(300)},
    },
    "a menu that takes itself in": {
        **SYSV,
        "/boot/grub/grub.cfg": "submenu a { source /boot/grub/grub.cfg; }\n" + MENU,
    },
    "functions that call each other": {
        **SYSV,
        "/boot/grub/grub.cfg": "function a { b; b; }\nfunction b { a; a; }\na\n" + MENU,
    },
    "a large file taken in often": {
        **SYSV,
        "/boot/grub/grub.cfg": "source /boot/grub/x\n" * 10_000 + MENU,
        "/boot/grub/x": "#" * 900_000,
    },
    "variables that double a line": {
        **SYSV,
        "/boot/grub/grub.cfg": "a=aaaaaaaa\n" + "a=$a$a\n" * 100 + times("linux $a ") + MENU,
    },
    "conditions that double": {
        **SYSV,
        "/boot/grub/grub.cfg": "".join(f"if x; then a{n}=b; else a{n}=c; fi\n" for n in range(5000))
        + MENU,
    },
    "includes that double": {
        **SYSV,
        "/boot/syslinux/syslinux.cfg": "INCLUDE syslinux.cfg\n" * 2,
    },
    "options without an end": {**SYSV, "/boot/grub/menu.lst": "title a\nkernel " + times("init=/")},
    "a path without an end": {**SYSV, "/boot/grub/menu.lst": "title a\nkernel init=" + times("/a")},
    "blank lines of dinit": {
        "/etc/os-release": OS_RELEASE,
        "/sbin/init": Link("dinit"),
        "/sbin/dinit": elf(),
        "/etc/dinit.d/boot": times("\n"),
    },
    "names of s6": {
        "/etc/os-release": OS_RELEASE,
        "/sbin/init": "#!/bin/sh\n" + times("s6-linux-init "),
        "/etc/s6-linux-init/current/run-image/service": None,
    },
    "scripts that hand over to each other": {
        "/etc/os-release": OS_RELEASE,
        "/sbin/init": "#!/bin/sh\n" + "".join(f"exec /x/{number}\n" for number in range(100)),
        **{
            f"/x/{number}": "#!/bin/sh\n" + "".join(f"exec /x/{other}\n" for other in range(100))
            for number in range(100)
        },
    },
    "a comment in os-release": {**SYSV, "/etc/os-release": "ID=" + times('"\\')},
    "an inittab of begin markers": {
        **BUSYBOX_TREE,
        "/etc/inittab": BEGIN * (4 * MB // len(BEGIN)),
    },
    "a port of many digits": {
        **SYSTEMD_TREE,
        "/etc/guest-agent.conf": "PORT=" + "1" * 60_000 + "\n",
    },
}


def executable_scripts(files: Tree) -> Tree:
    """Return the same tree with its scripts as executable files."""
    return {
        path: Program(what.encode()) if isinstance(what, str) and what[:2] == "#!" else what
        for path, what in files.items()
    }
