"""Layouts of guests that cannot be booted or had here, by what their own makers say of them.

Each is made from an init system's documentation or source, whose names stand beside
it; only what decides the verdict and the plan is in it.
"""

from __future__ import annotations

from tests.trees import Link, Program, Tree, elf

# dinit-chimera 0.99.24 (3c5898b): init, services/boot, services/system, meson.build; built by
# cports 7287fbf, main/dinit-chimera; Chimera's handbook, "Service management"
CHIMERA: Tree = {
    "/etc/os-release": 'ID=chimera\nPRETTY_NAME="Chimera Linux"\n',
    "/bin": Link("usr/bin"),
    "/sbin": Link("usr/bin"),
    # a script that prepares the environment; of the two ways, only that for containers is a name
    "/usr/bin/init": Program(
        b'#!/bin/sh\n[ -z "$container" ] || exec /usr/bin/dinit "$@"\n'
        b'set -- PATH=/usr/bin /usr/bin/dinit "$@"\nexec env -i "$@"\n'
    ),
    "/usr/bin/dinit": elf(content=b"/etc/dinit.d"),
    "/lib": Link("usr/lib"),
    "/usr/lib/dinit.d/boot": (
        "type = internal\ndepends-on: system\nwaits-for.d: /etc/dinit.d/boot.d\n"
    ),
    "/usr/lib/dinit.d/system": (
        "type = internal\ndepends-on: login.target\ndepends-on: network.target\n"
        "waits-for.d: /usr/lib/dinit.d/boot.d\n"
    ),
    "/usr/lib/dinit.d/local.target": "type = scripted\ndepends-on: pre-local.target\n",
    "/usr/lib/dinit.d/login.target": "type = internal\ndepends-on: local.target\n",
    "/usr/lib/dinit.d/sshd": (
        "type = process\ndepends-on: local.target\ndepends-on: network.target\n"
    ),
    "/etc/dinit.d/boot.d/sshd": Link("/usr/lib/dinit.d/sshd"),
}
# dinit 0.22.1: its example services, doc/linux/services
DINIT_EXAMPLE: Tree = {
    "/etc/os-release": 'ID=linux\nPRETTY_NAME="Linux with dinit"\n',
    "/sbin/init": Link("dinit"),
    "/sbin/dinit": elf(content=b"/etc/dinit.d"),
    "/etc/dinit.d/boot": (
        "type = internal\n\n# login prompts\ndepends-ms: tty1\n\nwaits-for.d: boot.d\n"
    ),
    "/etc/dinit.d/tty1": "type = process\ndepends-on: loginready\n",
    "/etc/dinit.d/loginready": "type = internal\ndepends-on: rcboot\n",
    "/etc/dinit.d/rcboot": "type = scripted\ndepends-on: filesystems\n",
    "/etc/dinit.d/boot.d/sshd": Link("../sshd"),
}
# dinit-rc, Artix's boot description; artools (lib/iso/services.sh) makes links with whole paths.
# Before dinit 0.20 settings were written with "=", which it still reads
ARTIX_DINIT: Tree = {
    "/etc/os-release": 'ID=artix\nPRETTY_NAME="Artix Linux"\n',
    "/bin": Link("usr/bin"),
    "/sbin": Link("usr/bin"),
    "/usr/bin/init": Link("dinit"),
    "/usr/bin/dinit": elf(content=b"/etc/dinit.d"),
    "/etc/dinit.d/boot": (
        "type = internal\ndepends-ms = getty\n"
        "waits-for = rclocal\nwaits-for = loginready\nwaits-for.d = boot.d\n"
    ),
    "/etc/dinit.d/loginready": "type = internal\n",
    "/etc/dinit.d/rclocal": "type = scripted\n",
    "/etc/dinit.d/boot.d/NetworkManager": Link("/etc/dinit.d/NetworkManager"),
}
# s6-linux-init 1.2.0.2 (2c4b041): what src/init/s6-linux-init-maker.c writes, and skel/; its
# doc/quickstart.html
_S6 = "/etc/s6-linux-init/current"
_SCANDIR = f"{_S6}/run-image/service"
S6_MAKER: Tree = {
    "/etc/os-release": 'ID=linux\nPRETTY_NAME="Linux with s6-linux-init"\n',
    "/sbin/init": Link(f"{_S6}/bin/init"),
    f"{_S6}/bin/init": Program(
        b'#!/bin/execlineb -S0\n\ns6-linux-init -c "/etc/s6-linux-init/current" -m 00022 '
        b'-p "/usr/bin:/bin" -d "/dev" -- "$@"\n'
    ),
    f"{_S6}/bin/halt": Program(b'#!/bin/execlineb -S0\n\ns6-linux-init-hpr -h "$@"\n'),
    f"{_S6}/env": None,
    f"{_S6}/scripts/rc.init": Program(b"#!/bin/sh -e\n"),
    f"{_S6}/scripts/runlevel": Program(b"#!/bin/sh -e\n"),
    f"{_SCANDIR}/.s6-svscan/crash": Program(b"#!/bin/execlineb -P\n"),
    f"{_SCANDIR}/s6-svscan-log/run": Program(b"#!/bin/execlineb -P\n"),
    f"{_SCANDIR}/s6-linux-init-shutdownd/run": Program(b"#!/bin/execlineb -P\n"),
    f"{_SCANDIR}/s6-linux-init-runleveld/run": Program(b"#!/bin/execlineb -P\n"),
    "/bin/s6-svscan": elf(),
}
# Artix's s6-linux-init 1.1.1.0 (initsys 9715318): s6-linux-init-maker -c /etc/s6/current, whose
# programs are moved to /usr/bin, `init` as s6-init; s6-scripts has /etc/s6/rc.local, which runs
# only if the service rc-local is in the compiled database
ARTIX_S6: Tree = {
    "/etc/os-release": 'ID=artix\nPRETTY_NAME="Artix Linux"\n',
    "/bin": Link("usr/bin"),
    "/sbin": Link("usr/bin"),
    "/usr/bin/init": Link("s6-init"),
    "/usr/bin/s6-init": Program(
        b'#!/usr/bin/execlineb -S0\n\ns6-linux-init -c "/etc/s6/current" -m 00022 -- "$@"\n'
    ),
    "/etc/s6/current/run-image/service/s6-linux-init-shutdownd/run": Program(b"#!/bin/sh\n"),
    "/etc/s6/current/scripts/rc.init": Program(b"#!/bin/sh -e\n"),
    "/etc/s6/adminsv/default/contents.d/sshd": "",
    "/etc/s6/sv/sshd-srv/type": "longrun\n",
    "/etc/s6/rc/compiled": None,
    "/etc/s6/rc.local": Program(b"#!/bin/sh\n"),
}
# OpenWrt 23.05: package/base-files (inittab, rc.common), procd's initd/preinit.c and inittab.c (the
# same in 2c1834a of August 2026); the squashfs image's root is read-only, an ext4 image's is not
OPENWRT: Tree = {
    "/etc/os-release": 'ID="openwrt"\nPRETTY_NAME="OpenWrt 23.05.5"\nVERSION_ID="23.05.5"\n',
    "/etc/openwrt_release": "DISTRIB_ID='OpenWrt'\n",
    "/sbin/init": elf(content=b"/etc/preinit\0/sbin/procd\0/etc/hotplug-preinit.json"),
    "/sbin/procd": elf(),
    "/bin/busybox": elf(content=b"BusyBox v1.36.1"),
    "/bin/sh": Link("busybox"),
    "/etc/preinit": Program(b"#!/bin/sh\n"),
    "/etc/inittab": (
        "::sysinit:/etc/init.d/rcS S boot\n::shutdown:/etc/init.d/rcS K shutdown\n"
        "::askconsole:/usr/libexec/login.sh\n"
    ),
    "/etc/rc.common": Program(b"#!/bin/sh\n"),
    "/etc/rc.local": "exit 0\n",
    "/etc/init.d/cron": Program(b"#!/bin/sh /etc/rc.common\nSTART=50\n"),
    "/etc/rc.d/S50cron": Link("../init.d/cron"),
}
# sysvinit-scripts of Slackware-current, as slackwarecn/slackware-loongarch64 keeps them: inittab
# 13.37 (7b610e9), rc.M (16ac9d3), rc.6
SLACKWARE: Tree = {
    "/etc/slackware-version": "Slackware 15.0\n",
    "/etc/os-release": 'ID=slackware\nPRETTY_NAME="Slackware 15.0 x86_64"\nVERSION_ID=15.0\n',
    "/sbin/init": elf(content=b"INIT: version booting /etc/inittab"),
    "/etc/inittab": (
        "id:3:initdefault:\nsi:S:sysinit:/etc/rc.d/rc.S\nsu:1S:wait:/etc/rc.d/rc.K\n"
        "rc:2345:wait:/etc/rc.d/rc.M\nl6:6:wait:/etc/rc.d/rc.6\n"
    ),
    "/etc/rc.d/rc.S": Program(b"#!/bin/bash\n"),
    "/etc/rc.d/rc.M": Program(b"#!/bin/sh\n[ ! -x /etc/rc.d/rc.local ] || /etc/rc.d/rc.local\n"),
    "/etc/rc.d/rc.local": Program(b"#!/bin/bash\n"),
    # it runs SysV scripts too, by rc.sysvinit
    "/etc/rc.d/init.d": None,
    "/etc/rc.d/rc3.d": None,
}
# SUSE's init.d(7): the runlevels are below /etc/init.d, and rc goes by .depend.* where startpar is
SLES_11: Tree = {
    "/etc/SuSE-release": "SUSE Linux Enterprise Server 11 (x86_64)\nVERSION = 11\nPATCHLEVEL = 4\n",
    "/sbin/init": elf(content=b"INIT: version booting /etc/inittab"),
    "/sbin/startpar": elf(),
    "/etc/inittab": "si::bootwait:/etc/init.d/boot\nl3:3:wait:/etc/init.d/rc 3\n",
    "/etc/rc.d": Link("init.d"),
    "/etc/init.d/rc": Program(b"#!/bin/bash\n"),
    "/etc/init.d/rc3.d/S12cron": Link("../cron"),
    "/etc/init.d/rc5.d/S12cron": Link("../cron"),
    "/etc/init.d/.depend.boot": "TARGETS = boot.proc\n",
    "/etc/init.d/.depend.start": "TARGETS = cron\n",
    "/etc/init.d/.depend.stop": "TARGETS = cron\n",
}
# Void's handbook, "Services and Daemons - runit"; void-runit 20250212 (22a9080): the file 2, which
# becomes /etc/runit/2, runs rc.local and starts runsvdir
VOID: Tree = {
    "/etc/os-release": 'ID=void\nPRETTY_NAME="Void Linux"\n',
    "/bin": Link("usr/bin"),
    "/sbin": Link("usr/bin"),
    "/usr/bin/init": Link("runit-init"),
    "/usr/bin/runit-init": elf(content=b"/etc/runit/stopit"),
    "/etc/runit/2": Program(b"#!/bin/sh\nrunsvchdir default\n"),
    "/etc/runit/runsvdir/current": Link("default"),
    "/etc/runit/runsvdir/default/sshd": Link("/etc/sv/sshd"),
    "/etc/sv/sshd/run": Program(b"#!/bin/sh\nexec /usr/bin/sshd -D\n"),
    "/etc/rc.conf": "# HARDWARECLOCK\n",
    "/etc/rc.local": "# run by /etc/runit/2\n",
}
