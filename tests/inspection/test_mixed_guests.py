"""Guests with files of several init systems, parts of guests, and what inspect explains of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import (
    BUSYBOX_TREE,
    OS_RELEASE,
    SYSTEMD_TREE,
    Link,
    Program,
    Tree,
    elf,
    make_tree,
    python_tree,
)
from vmprovision.errors import AmbiguousInitError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import RunCli

RELEASE: Tree = {"/etc/os-release": OS_RELEASE}
SYSVINIT = elf(content=b"INIT: version booting /etc/inittab")
UPSTART = elf(content=b"com.ubuntu.Upstart /etc/inittab")
PYTHON = python_tree()
OPENRC_SERVICE: Tree = {"/etc/runlevels/default/crond": Link("/etc/init.d/crond")}
WANTED: Tree = {"/etc/systemd/system/multi-user.target.wants/x.service": Link("/x.service")}
RC_LOCAL: Tree = {"/etc/rc.local": "#!/bin/sh\n"}

GUESTS: dict[str, tuple[str, str, Tree]] = {
    "CentOS 5": (
        "sysv",
        "redhat",
        {
            "/sbin/init": SYSVINIT,
            "/etc/inittab": "si::sysinit:/etc/rc.d/rc.sysinit\nl3:3:wait:/etc/rc.d/rc 3\n",
            "/etc/rc.d/init.d": None,
            "/etc/init.d": Link("rc.d/init.d"),
        },
    ),
    "CentOS 6 without its programs but init": (
        "sysv",
        "redhat",
        {
            "/sbin/init": UPSTART,
            "/etc/inittab": "id:3:initdefault:\n",
            "/etc/init/rc.conf": "start on runlevel [0123456]\nexec /etc/rc.d/rc $RUNLEVEL\n",
            "/etc/init/tty.conf": "respawn\n",
            "/etc/rc.d/init.d": None,
        },
    ),
    "CentOS 7 with all that is left of SysV": (
        "systemd",
        "",
        {
            "/sbin": Link("usr/sbin"),
            "/usr/sbin/init": Link("../lib/systemd/systemd"),
            "/usr/lib/systemd/systemd": elf(),
            "/etc/inittab": "# inittab is no longer used.\n",
            "/etc/rc.d/init.d/network": "#!/bin/sh\n",
            "/etc/rc.d/rc.local": "#!/bin/sh\n",
        },
    ),
    "Ubuntu 16.04 with Upstart's jobs": (
        "systemd",
        "",
        {
            "/sbin/init": Link("/lib/systemd/systemd"),
            "/lib/systemd/systemd": elf(),
            "/sbin/upstart": UPSTART,
            "/etc/init/cron.conf": "exec cron\n",
            "/etc/rc2.d/S01cron": Link("../init.d/cron"),
        },
    ),
    "Ubuntu 15.04 that went back to Upstart": (
        "upstart",
        "",
        {
            "/sbin/init": Link("upstart"),
            "/sbin/upstart": UPSTART,
            "/lib/systemd/systemd": elf(),
            "/etc/init/cron.conf": "exec cron\n",
            **WANTED,
        },
    ),
    "Debian with sysvinit, systemd and runit": (
        "sysv",
        "debian",
        {
            "/sbin/init": SYSVINIT,
            "/etc/inittab": "l2:2:wait:/etc/init.d/rc 2\n",
            "/lib/systemd/systemd": elf(),
            "/sbin/runit-init": elf(),
            "/etc/runit/runsvdir/default": None,
            **WANTED,
        },
    ),
    "Gentoo under systemd": (
        "systemd",
        "",
        {
            **SYSTEMD_TREE,
            "/etc/inittab": "l3:3:wait:/sbin/openrc default\n",
            "/usr/sbin/openrc": elf(),
            **OPENRC_SERVICE,
        },
    ),
    "Gentoo without OpenRC's programs": (
        "openrc",
        "runscript",
        {
            "/sbin/init": SYSVINIT,
            "/etc/inittab": "l3:3:wait:/sbin/rc default\n",
            "/etc/init.d/crond": "#!/sbin/runscript\n",
            **OPENRC_SERVICE,
        },
    ),
    "Alpine 2.6": (
        "openrc",
        "runscript",
        {
            **BUSYBOX_TREE,
            "/etc/inittab": "::sysinit:/sbin/rc sysinit\n::wait:/sbin/rc default\n",
            "/sbin/rc": elf(),
            "/sbin/runscript": elf(),
            "/etc/runlevels/default": None,
        },
    ),
    "Alpine without any program": (
        "openrc",
        "openrc-run",
        {
            "/sbin/init": Link("/bin/busybox"),
            "/etc/inittab": "::sysinit:/sbin/openrc sysinit\n",
            **OPENRC_SERVICE,
        },
    ),
    "Void": (
        "runit",
        "usual",
        {
            "/sbin": Link("usr/bin"),
            "/usr/bin/init": Link("runit-init"),
            "/usr/bin/runit-init": elf(),
            "/etc/runit/runsvdir/default": None,
            "/etc/sv": None,
            "/etc/rc.conf": "# what runit reads\n",
            **RC_LOCAL,
        },
    ),
    "Artix with s6": (
        "s6",
        "rc.local",
        {
            "/sbin": Link("usr/bin"),
            "/usr/bin/init": Link("/etc/s6/current/bin/init"),
            "/etc/s6/current/bin/init": Program(
                b'#!/usr/bin/execlineb -S0\ns6-linux-init -c "/etc/s6/current" -m 00022 -- "$@"\n'
            ),
            "/etc/s6/rc.local": "#!/bin/sh\n",
        },
    ),
    "OpenWrt on MIPS, a BusyBox beside it": (
        "procd",
        "",
        {
            "/sbin/init": elf(8, bits=32, content=b"/etc/preinit\0/sbin/procd"),
            "/bin/busybox": elf(8, bits=32, content=b"BusyBox v1"),
            "/etc/inittab": "::sysinit:/etc/init.d/rcS S boot\n",
            "/etc/rc.common": "#!/bin/sh\n",
            **python_tree(machine=8, bits=32),
        },
    ),
    "CRUX": (
        "standalone",
        "",
        {
            "/sbin/init": SYSVINIT,
            "/etc/inittab": "rm:2345:wait:/etc/rc.multi\n",
            "/etc/rc.multi": "#!/bin/bash\n[ ! -x /etc/rc.local ] || /etc/rc.local\n",
            **RC_LOCAL,
        },
    ),
    "a container's own init that runs rc.local": (
        "standalone",
        "",
        {
            "/sbin/init": Program(b"#!/usr/bin/python3\nrun('/etc/rc.local')\n"),
            **RC_LOCAL,
            **WANTED,
        },
    ),
    "an unknown init and an rc.local, and nothing else": (
        "standalone",
        "",
        {"/sbin/init": elf(content=b"odd"), **RC_LOCAL},
    ),
}


@pytest.mark.parametrize("name", GUESTS)
def test_what_is_process_1_decides(name: str, tmp_path: Path) -> None:
    """Generate markers of other init systems, and guests with missing parts."""
    system, dialect, files = GUESTS[name]
    make_tree(tmp_path, {**RELEASE, **PYTHON, **files})
    verdict = vmprovision.plan(tmp_path).guest.init
    assert (verdict.system, verdict.dialect) == (system, dialect)


@pytest.mark.parametrize(
    "files",
    [
        {"/etc/init.d/x": "#!/bin/sh\n", "/bin/sh": elf(), **WANTED},
        # no init, and two that could be started
        {"/lib/systemd/systemd": elf(), "/sbin/openrc-init": elf(), "/bin/sh": elf()},
        {"/sbin/init": elf(content=b"odd"), **RC_LOCAL, **WANTED},
    ],
)
def test_what_decides_nothing_is_refused(files: Tree, tmp_path: Path) -> None:
    """Containers without an init, leftovers of several: the error says what was seen."""
    make_tree(tmp_path, {**RELEASE, **PYTHON, **files})
    with pytest.raises(AmbiguousInitError) as caught:
        vmprovision.plan(tmp_path)
    assert "--init" in caught.value.hint
    assert "systemd" in caught.value.hint


@pytest.mark.parametrize(
    "files",
    [
        {"/sbin/init": Link("/lib/systemd/systemd")},
        {"/sbin/init": Link("/lib/systemd/systemd"), "/lib/systemd/systemd": "\x7fELF, not 0755"},
        {"/usr/sbin/init": Link("../lib/systemd/systemd"), "/usr/lib/systemd/systemd": elf()},
    ],
)
def test_a_part_of_a_guest_is_likely_only(files: Tree, tmp_path: Path) -> None:
    """A link without its target, a program without its mode, /usr without the links into it."""
    verdict = vmprovision.inspect(make_tree(tmp_path, {**RELEASE, **files})).init
    assert (verdict.system, verdict.confidence) == ("systemd", "likely")


@pytest.mark.parametrize(
    ("content", "dialect"),
    [
        (b"org.freedesktop.systemd1", "static-user"),
        (b"org.freedesktop.systemd1 io.systemd.DynamicUser", ""),
        (b"libsystemd-core-252.so", ""),
    ],
)
def test_an_old_systemd_gets_a_unit_that_it_understands(
    content: bytes, dialect: str, tmp_path: Path
) -> None:
    """CentOS 7's and Ubuntu 16.04's know no dynamic users, and would leave the agent root."""
    files: Tree = {**SYSTEMD_TREE, "/usr/lib/systemd/systemd": elf(content=content.ljust(600_000))}
    plan = vmprovision.plan(make_tree(tmp_path, files))
    assert plan.guest.init.dialect == dialect
    vmprovision.inject(tmp_path)
    unit = (tmp_path / "etc/systemd/system/guest-agent.service").read_text()
    assert ("DynamicUser=yes" in unit) is not bool(dialect)
    assert ("guest-agent --user nobody\n" in unit) is bool(dialect)


def test_explain_shows_what_speaks_for_whom_and_why_it_lost(
    tmp_path: Path, run_cli: RunCli
) -> None:
    """A Gentoo under systemd with OpenRC's runlevels, and entries of its menu for others."""
    menu = (
        "menuentry 'Gentoo' {\n linux /v root=x\n}\n"
        "menuentry 'Gentoo, OpenRC' {\n linux /v root=x init=/usr/sbin/openrc-init\n}\n"
    )
    files = {**GUESTS["Gentoo under systemd"][2], "/usr/sbin/openrc-init": elf()}
    make_tree(tmp_path, {**files, "/boot/grub/grub.cfg": menu, **WANTED})
    found = json.loads(run_cli("inspect", tmp_path, "--explain", "--json").stdout)["init"]
    hints = {(hint["for"], hint["kind"]): hint for hint in found["hints"]}
    assert found["system"] == "systemd"
    assert hints["systemd", "files"]["outcome"] == "agrees"
    assert hints["openrc", "files"]["seen"] == "/etc/runlevels/default holds 1 entry"
    assert hints["openrc", "files"]["outcome"].endswith("systemd runs the services")
    assert "process 1, which is systemd" in hints["openrc", "program"]["outcome"]
    assert "'Gentoo, OpenRC'" in hints["openrc-init", "boot"]["seen"]
    assert hints["openrc-init", "boot"]["outcome"] == "boots only if a person chooses it"
    text = run_cli("inspect", tmp_path, "--explain").stdout
    assert "against openrc: /etc/runlevels/default holds 1 entry; " in text
    assert "for     systemd: " in text
    assert "hints" not in json.loads(run_cli("inspect", tmp_path, "--json").stdout)["init"]
    assert "against" not in run_cli("inspect", tmp_path).stdout
