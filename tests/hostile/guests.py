"""Guest files that are read offline, and guests made to keep their reader busy for ever.

``SEEDS`` holds a valid content for every file that inspection or planning parses, in a
guest in which that file matters.  ``GUESTS`` holds the hostile guests that were thought
of or found.  Each is a function, so that megabytes are not kept in the repository.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.trees import (
    BUSYBOX_TREE,
    OS_RELEASE,
    SYSTEMD_TREE,
    Link,
    Tree,
    elf,
    make_tree,
    python_tree,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MB = 1 << 20
SYSV_TREE: Tree = {
    "/etc/os-release": OS_RELEASE,
    "/sbin/init": elf(content=b"INIT: version booting /etc/inittab"),
    "/etc/inittab": "id:2:initdefault:\nl2:2:wait:/etc/init.d/rc 2\n",
    "/etc/init.d/rc": "#!/bin/sh\n",
    "/lib/lsb/init-functions": "# functions\n",
    "/bin/sh": elf(),
    **python_tree(),
}
SELINUX_TREE: Tree = {
    **SYSTEMD_TREE,
    "/etc/selinux/config": "SELINUX=enforcing\nSELINUXTYPE=targeted\n",
    "/etc/selinux/targeted/contexts/files/file_contexts": (
        "/.*\tsystem_u:object_r:default_t:s0\n/usr/local/bin(/.*)?\tsystem_u:object_r:bin_t:s0\n"
    ),
}
GRUB = """\
if [ "${next_entry}" ] ; then
  set default="${next_entry}"
else
  set default="0"
fi
menuentry 'Debian' --class debian $menuentry_id_option 'simple' {
  linux /vmlinuz root=/dev/vda1 ro init=/sbin/init quiet
}
submenu 'More' { menuentry "b" { linux /v init=/bin/sh; } }
"""
RECEIPT = {
    "schema": 1,
    "agent_version": "0.1.0",
    "init": "systemd",
    "entries": [
        {
            "path": "/usr/local/bin/guest-agent",
            "kind": "file",
            "mode": "0755",
            "sha256": "0" * 64,
            "before": {"kind": "absent"},
        }
    ],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """A valid file, its path, and the other files of its guest."""

    path: str
    content: bytes
    tree: Tree = field(default_factory=lambda: SYSTEMD_TREE)


SEEDS = (
    Seed(path="/etc/os-release", content=OS_RELEASE.encode() + b'NAME=\'a b\'\nHOME="x\\"y"\n'),
    Seed(path="/etc/lsb-release", content=b'DISTRIB_ID=Ubuntu\nDISTRIB_DESCRIPTION="U 14"\n'),
    Seed(path="/etc/redhat-release", content=b"CentOS release 6.10 (Final)\n"),
    Seed(path="/etc/SuSE-release", content=b"SUSE Linux 11\nVERSION = 11\nPATCHLEVEL = 4\n"),
    Seed(
        path="/etc/fstab",
        content=b"UUID=1-2 / ext4 defaults 0 1\nLABEL=a\\040b /var xfs noauto 0 0\n"
        b"//host/x /mnt cifs _netdev\ntmpfs /usr/local tmpfs size=1m\n",
    ),
    Seed(path="/etc/crypttab", content=b"home UUID=1-2 none luks,discard\n"),
    Seed(path="/etc/systemd/system/opt.mount", content=b"[Mount]\nWhat=/dev/x\nWhere=/opt\n"),
    Seed(path="/boot/grub/grub.cfg", content=GRUB.encode()),
    Seed(path="/boot/grub2/grub.cfg", content=GRUB.encode()),
    Seed(
        path="/boot/grub/grubenv",
        content=b"# GRUB Environment Block\nsaved_entry=1>0\n" + b"#" * 900,
        tree={**SYSTEMD_TREE, "/boot/grub/grub.cfg": GRUB.replace('"0"', '"${saved_entry}"')},
    ),
    Seed(path="/boot/grub/menu.lst", content=b"default 1\ntitle A\nkernel /v init=/x\ntitle B\n"),
    Seed(
        path="/boot/extlinux/extlinux.conf",
        content=b"DEFAULT b\nLABEL a\n LINUX /v\n APPEND root=x\nLABEL b\n INCLUDE x\n APPEND q\n",
    ),
    Seed(path="/boot/loader/entries/a.conf", content=b"title A\nlinux /v\noptions init=/x $o\n"),
    Seed(path="/boot/loader/loader.conf", content=b"default a-*\ntimeout 3\n"),
    Seed(path="/etc/lilo.conf", content=b'default=a\nimage=/v\n label=a\n append="init=/x y"\n'),
    Seed(path="/boot/cmdline.txt", content=b"console=tty1 root=/dev/mmcblk0p2 init=/x quiet\n"),
    Seed(path="/etc/default/grub", content=b'GRUB_CMDLINE_LINUX="quiet init=/sbin/init"\n'),
    Seed(path="/etc/inittab", content=b"l2:2:wait:/etc/init.d/rc 2\n", tree=SYSV_TREE),
    Seed(
        path="/etc/init.d/.depend.start",
        content=b"TARGETS = a b\nINTERACTIVE = a\nb: a\na: $network\n",
        tree={**SYSV_TREE, "/sbin/startpar": elf(), "/etc/init.d/.depend.stop": "TARGETS = a\n"},
    ),
    Seed(path="/etc/inittab", content=b"::sysinit:/etc/rc\ntty::respawn:x\n", tree=BUSYBOX_TREE),
    Seed(path="/etc/rc.local", content=b"#!/bin/sh -e\nfoo\nexit 0\n", tree=BUSYBOX_TREE),
    Seed(path="/etc/selinux/config", content=b"SELINUX=permissive\nSELINUXTYPE=targeted # x\n"),
    Seed(
        path="/etc/selinux/targeted/contexts/files/file_contexts",
        content=b"/usr/(local/)?bin(/.*)?\t--\tsystem_u:object_r:bin_t:s0:c1,c2\n"
        b"/etc/[^/]+ <<none>>\n",
        tree=SELINUX_TREE,
    ),
    Seed(
        path="/etc/selinux/targeted/contexts/files/file_contexts.subs_dist",
        content=b"/usr/local/bin /usr/bin\n/run /var/run\n",
        tree=SELINUX_TREE,
    ),
    Seed(
        path="/usr/local/lib/guest-agent/receipt.json", content=json.dumps(RECEIPT).encode("ascii")
    ),
    Seed(path="/etc/guest-agent.conf", content=b"VM_ID=a\n# x\nPORT=8080\nTOKEN='x y'\n"),
    Seed(path="/usr/lib/systemd/systemd", content=elf().content),
    Seed(path="/usr/bin/python3.11", content=elf(content=b"\0" * 400).content),
    Seed(
        path="/sbin/init", content=b"#!/bin/sh -e\nexec /lib/systemd/systemd $x\n", tree=SYSV_TREE
    ),
    Seed(path="/etc/systemd/system/default.target", content=b"[Unit]\nWants=multi-user.target\n"),
    Seed(path="/usr/lib/systemd/system-preset/00-a.preset", content=b"enable x*\ndisable *\n"),
    Seed(path="/var/lib/dpkg/info/systemd-sysv.list", content=b"/.\n/sbin\n/sbin/init\n"),
    Seed(path="/etc/passwd", content=b"root:x:0:0:root:/root:/bin/sh\n"),
)


def plant(seed: Seed, content: bytes, root: Path) -> Path:
    """Make the guest of a seed in a new directory, with this content in the seed's file."""
    make_tree(root, {name: what for name, what in seed.tree.items() if name != seed.path})
    path = root / seed.path.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(0o755)
    return root


def _circle_of_menus() -> Tree:
    """Make three hundred EFI vendors that share one menu of the largest size allowed."""
    vendors: Tree = {
        f"/boot/efi/EFI/v{number}/grub.cfg": Link("/boot/grub/grub.cfg") for number in range(300)
    }
    menu = "menuentry 'x' { linux /v init=/sbin/init; }\n" * 20_000
    return {**SYSTEMD_TREE, "/boot/grub/grub.cfg": menu, **vendors}


def _doubling_links() -> Tree:
    """Make twenty-four directories, each of which leads to the next by a link."""
    deep = "/".join(f"d{number}" for number in range(24))
    receipt = {
        **RECEIPT,
        "entries": [{"path": f"/{deep}", "kind": "file", "before": {"kind": "absent"}}],
    }
    links: Tree = {f"/l{number}": Link(f"/l{number + 1}/.") for number in range(24)}
    return {
        **SYSTEMD_TREE,
        **links,
        f"/{deep}/x": "x",
        "/usr/local/lib/guest-agent/receipt.json": json.dumps(receipt),
    }


def _with(tree: Tree, path: str, content: str | bytes) -> Tree:
    return {**tree, path: content}


def _label(label: str) -> Tree:
    path = "/etc/selinux/targeted/contexts/files/file_contexts"
    return _with(SELINUX_TREE, path, f"/.*\t{label}\n")


def _nested(depth: int) -> str:
    return "submenu 'a' {\n" * depth + "linux /v\n" + "}\n" * depth


def _set_of(name: str) -> str:
    return f"set {name}=${{{name}}}${{{name}}}\n"


GUESTS: dict[str, Callable[[], Tree]] = {
    "label of colons": lambda: _label("a:" * 500),
    "label of colons that ends wrong": lambda: _label("a:" * 500 + "\x01"),
    "pattern of stars": lambda: _with(
        SELINUX_TREE,
        "/etc/selinux/targeted/contexts/files/file_contexts",
        "(.*)*" * 500 + "x\tsystem_u:object_r:bin_t:s0\n",
    ),
    "many patterns": lambda: _with(
        SELINUX_TREE,
        "/etc/selinux/targeted/contexts/files/file_contexts",
        "/(.*(a|b)?)*c\tsystem_u:object_r:bin_t:s0\n" * 49_000,
    ),
    "grubenv of blanks": lambda: {
        **SYSTEMD_TREE,
        "/boot/grub/grub.cfg": GRUB.replace('"0"', '"${saved_entry}"'),
        "/boot/grub/grubenv": "# GRUB Environment Block\nsaved_entry=" + " " * MB,
    },
    "selinux/config of one word": lambda: _with(
        SELINUX_TREE, "/etc/selinux/config", "SELINUXTYPE=" + "a" * MB
    ),
    "selinux/config of one quote": lambda: _with(
        SELINUX_TREE, "/etc/selinux/config", "SELINUXTYPE='" + "\\'" * (MB // 2)
    ),
    "GRUB title of one word": lambda: _with(
        SYSTEMD_TREE, "/boot/grub/grub.cfg", "menuentry '" + "a\\" * (MB // 2)
    ),
    "GRUB line that goes on": lambda: _with(
        SYSTEMD_TREE, "/boot/grub/grub.cfg", "menuentry 'a' {\n" + "linux \\\n" * (MB // 8)
    ),
    "deep submenus": lambda: _with(SYSTEMD_TREE, "/boot/grub/grub.cfg", _nested(40_000)),
    "variables that double": lambda: _with(
        SYSTEMD_TREE,
        "/boot/grub/grub.cfg",
        "set a=xx\n" + _set_of("a") * 400 + "set default=$a\nmenuentry 'a' { linux $a }\n",
    ),
    "menus that include each other": lambda: {
        **SYSTEMD_TREE,
        "/boot/grub/grub.cfg": "source /boot/grub/custom.cfg\n" * 1000,
        "/boot/grub/custom.cfg": "configfile /boot/grub/grub.cfg\nsource /boot/grub/grub.cfg\n" * 9,
    },
    "syslinux that includes itself": lambda: _with(
        SYSTEMD_TREE, "/boot/syslinux/syslinux.cfg", "INCLUDE syslinux.cfg\n" * 50
    ),
    "menus of many vendors": _circle_of_menus,
    "inittab of begin markers": lambda: _with(
        BUSYBOX_TREE, "/etc/inittab", "# BEGIN guest-agent (vmprovision)\n" * (4 * MB // 34)
    ),
    "inittab of colons": lambda: _with(SYSV_TREE, "/etc/inittab", ":" * (4 * MB)),
    "rc.local of exits": lambda: _with(BUSYBOX_TREE, "/etc/rc.local", "exit 0\n" * (MB // 7)),
    "depend of targets": lambda: {
        **SYSV_TREE,
        "/sbin/startpar": elf(),
        "/etc/init.d/.depend.start": "TARGETS = " + "a " * (MB // 2),
        "/etc/init.d/.depend.stop": "TARGETS = a\n",
    },
    "receipt of directories": _doubling_links,
    "receipt of brackets": lambda: _with(
        SYSTEMD_TREE, "/usr/local/lib/guest-agent/receipt.json", "[" * MB
    ),
    "receipt of digits": lambda: _with(
        SYSTEMD_TREE,
        "/usr/local/lib/guest-agent/receipt.json",
        '{"schema": ' + "1" * 900_000 + "}",
    ),
    "receipt of surrogates": lambda: _with(
        SYSTEMD_TREE,
        "/usr/local/lib/guest-agent/receipt.json",
        json.dumps(RECEIPT).replace("/usr/local/bin", "/usr/\\ud800\\udfff\\udc00"),
    ),
    "receipt as large as it likes": lambda: _with(
        SYSTEMD_TREE,
        "/usr/local/lib/guest-agent/receipt.json",
        json.dumps({**RECEIPT, "entries": RECEIPT["entries"] * 300_000}),  # type: ignore[operator]  # a list
    ),
    "fstab of 50,000 lines": lambda: _with(
        SYSTEMD_TREE,
        "/etc/fstab",
        "".join(f"/dev/disk/by-id/d{n} /usr/local/{n} ext4 x 0 0\n" for n in range(50_000)),
    ),
    "release file of one line": lambda: _with(SYSTEMD_TREE, "/etc/os-release", "A=" + "\\" * MB),
    "release file that leads to itself": lambda: {
        **SYSTEMD_TREE,
        "/etc/os-release": Link("os-release"),
    },
    "links that double": lambda: {
        **SYSTEMD_TREE,
        **{f"/etc/x{n}": Link(f"x{n + 1}/../x{n + 1}") for n in range(60)},
        "/usr/local/lib": Link("/etc/x0"),
    },
    "python of dots": lambda: {
        **SYSTEMD_TREE,
        **{f"/usr/lib/python3.{n}/os.py": "" for n in range(3000)},
    },
    "kernels by the thousand": lambda: {
        **SYSTEMD_TREE,
        **{f"/boot/vmlinuz-{n}" + ".1" * 90: "" for n in range(3000)},
    },
    "kernel of digits": lambda: _with(SYSTEMD_TREE, "/boot/vmlinuz-" + "9" * 240, ""),
    "targets in a circle": lambda: {
        **SYSTEMD_TREE,
        "/etc/systemd/system/default.target": Link("a.target"),
        **{
            f"/etc/systemd/system/{a}.target": "[Unit]\n" + f"Wants={b}.target {a}.target\n" * 5000
            for a, b in (("a", "b"), ("b", "a"))
        },
    },
    "presets by the thousand": lambda: {
        **SYSTEMD_TREE,
        **{
            f"/usr/lib/systemd/system-preset/{n:04}.preset": "disable " + "*a" * 2000 + "\n"
            for n in range(2000)
        },
    },
    "configuration of quotes": lambda: _with(
        SYSTEMD_TREE, "/etc/guest-agent.conf", "VM_ID=" + "'\"\\" * 20_000
    ),
    "hand-overs in a circle": lambda: {
        **SYSV_TREE,
        "/sbin/init": "#!/bin/sh\n" + "exec /sbin/a\nexec /sbin/b\n" * 2000,
        "/sbin/a": "#!/bin/sh\n" + "exec /sbin/b\nexec /sbin/init\n" * 2000,
        "/sbin/b": "#!/bin/sh\n" + "exec /sbin/a\nexec /sbin/init\n" * 2000,
    },
}
