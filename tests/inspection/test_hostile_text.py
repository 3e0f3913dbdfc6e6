"""Guest text that a careless parser never finishes: each is done within a few processor seconds.

The limit is one of processor time in a process of its own, so a loaded host changes
nothing, and it is far above what is needed: the parsers of old took minutes or for ever.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.trees import BUSYBOX_TREE, OS_RELEASE, SYSTEMD_TREE, Link, Program, Tree, elf, make_tree
from vmprovision.changes.blocks import find_blocks, marked, strip_blocks
from vmprovision.guest.shelltext import VALUE_LIMIT, assigned_value

if TYPE_CHECKING:
    from pathlib import Path

PROCESSOR_SECONDS = 20
HANG_SECONDS = 300
MEMORY = 2 << 30
MEGABYTE = 1 << 20

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
    """Return about a megabyte of this."""
    return text * (MEGABYTE // len(text))


HOSTILE: dict[str, Tree] = {
    "grubenv of blanks": {
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
    "variables that double": {
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
        "/etc/inittab": BEGIN * (4 * MEGABYTE // len(BEGIN)),
    },
    "a port of many digits": {
        **SYSTEMD_TREE,
        "/etc/guest-agent.conf": "PORT=" + "1" * 60_000 + "\n",
    },
}


def limited() -> None:
    """Limit this process's processor time and memory."""
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


@pytest.mark.parametrize("name", HOSTILE)
def test_guest_text_without_an_end_is_finished(name: str, tmp_path: Path) -> None:
    """`plan` ends with a plan or one clear refusal, and needs little time and memory."""
    tree = make_tree(tmp_path, executable_scripts(HOSTILE[name]))
    done = subprocess.run(
        [sys.executable, "-m", "vmprovision", "plan", str(tree)],
        capture_output=True,
        check=False,
        preexec_fn=limited,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert 0 <= done.returncode < 64, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 20_000


def executable_scripts(files: Tree) -> Tree:
    """Return the same tree with its scripts executable."""
    return {
        path: Program(what.encode()) if isinstance(what, str) and what[:2] == "#!" else what
        for path, what in files.items()
    }


@pytest.mark.parametrize("count", [1, 50_000])
def test_blocks_are_found_in_one_pass(count: int) -> None:
    """However many begin markers there are, each line is looked at once."""
    block = marked("guest-agent", b"x\n")
    content = BEGIN * count + b"other\n" + block
    assert len(find_blocks("guest-agent", content)) == count + 1
    assert strip_blocks("guest-agent", content) == b"other\n"


def test_a_value_is_bounded() -> None:
    """Variables that grow with each line do not grow without an end."""
    value = "x" * 100
    for _ in range(20):
        value = assigned_value('"$a$a$a$a"', {"a": value})
    assert len(value) == VALUE_LIMIT
