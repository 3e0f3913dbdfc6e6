"""Which program is PID 1, and what runs services: on small trees, one question each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import (
    BUSYBOX_TREE,
    OS_RELEASE,
    REAL_ETC,
    SYSTEMD_TREE,
    Link,
    Program,
    Tree,
    elf,
    make_tree,
)
from vmprovision.errors import AmbiguousInitError
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.inspection.pid1 import find_pid1

if TYPE_CHECKING:
    from pathlib import Path


def pid1_of(root: Path, files: Tree) -> str:
    """Return the program that a tree's kernel would start."""
    return find_pid1(LocalFilesystem(make_tree(root, files))).program


def test_links_are_followed_through_usr_merge(tmp_path: Path) -> None:
    """Through /sbin -> usr/sbin and /usr/sbin/init -> ../lib/systemd/systemd."""
    guest = vmprovision.inspect(make_tree(tmp_path, SYSTEMD_TREE))
    assert (guest.init.system, guest.init.pid1) == ("systemd", "systemd")
    assert guest.init.confidence == "certain"
    assert guest.init.evidence[0] == "/sbin/init leads to /usr/lib/systemd/systemd"


def test_absolute_links_stay_inside_the_guest(tmp_path: Path) -> None:
    """An absolute link starts at the guest's root, not at the host's."""
    files: Tree = {"/sbin/init": Link("/nowhere/busybox"), "/nowhere/busybox": elf()}
    assert pid1_of(tmp_path, {**files, "/etc/os-release": OS_RELEASE}) == "busybox"


def test_links_with_too_many_dots_stay_inside_the_guest(tmp_path: Path) -> None:
    """``..`` at the guest's root stays there."""
    files: Tree = {"/sbin/init": Link("../../../../../../opt/dinit"), "/opt/dinit": elf()}
    assert pid1_of(tmp_path, files) == "dinit"


@pytest.mark.parametrize("link", ["/sbin/b", "/usr/lib/systemd/systemd"])
def test_an_init_that_cannot_be_started_is_passed_over(tmp_path: Path, link: str) -> None:
    """A circle of links, a dangling one: the kernel tries the next, and so is told here."""
    files: Tree = {"/sbin/init": Link(link), "/sbin/b": Link("init"), "/bin/init": elf()}
    make_tree(tmp_path, {"/etc/os-release": OS_RELEASE, **files, "/opt/dinit": elf()})
    (tmp_path / "bin/init").unlink()
    make_tree(tmp_path, {"/bin/init": Link("/opt/dinit")})
    found = find_pid1(LocalFilesystem(tmp_path))
    assert found.program == "dinit"
    assert found.evidence[0].startswith("/sbin/init leads")


def test_a_dangling_init_beside_a_shell_is_never_guessed(tmp_path: Path) -> None:
    """With /usr on another filesystem only a shell is left, and inject asks for --init."""
    files: Tree = {"/sbin/init": Link("/usr/lib/systemd/systemd"), "/bin/sh": elf()}
    make_tree(tmp_path, {**files, "/etc/os-release": OS_RELEASE, "/etc/rc.local": "#!/bin/sh\n"})
    with pytest.raises(AmbiguousInitError, match="/usr on a filesystem") as caught:
        vmprovision.plan(tmp_path)
    assert "--init" in caught.value.hint


@pytest.mark.parametrize(
    ("script", "program"),
    [
        ('exec >/dev/console\nexec /usr/lib/systemd/systemd "$@"\n', "systemd"),
        ("pivot_root . mnt\nexec /usr/sbin/chroot . /sbin/real-init $@\n", "sysvinit"),
        ("[ -e /x ] && exec /usr/lib/systemd/systemd\nexec /opt/dinit\n", "script"),
        ("# exec /opt/dinit\nexec /bin/sh\n", "script"),
        ("exec /sbin/init\n", "script"),
    ],
)
def test_a_script_is_what_it_hands_over_to(tmp_path: Path, script: str, program: str) -> None:
    """Wrappers of containers and overlays exec the real init; two of them decide nothing."""
    files: Tree = {
        "/sbin/init": Program(f"#!/bin/sh\n{script}".encode()),
        "/sbin/real-init": elf(content=b"/etc/inittab"),
        "/usr/lib/systemd/systemd": elf(),
        "/usr/sbin/chroot": elf(),
        "/opt/dinit": elf(),
        "/bin/sh": elf(),
    }
    assert pid1_of(tmp_path, files) == program


def test_directories_of_systemd_do_not_make_a_systemd_guest(tmp_path: Path) -> None:
    """Upstart guests have /etc/systemd and /lib/systemd/system as well."""
    files: Tree = {
        "/etc/os-release": OS_RELEASE,
        "/etc/systemd/system": None,
        "/lib/systemd/systemd": elf(),
        "/sbin/init": elf(content=b"com.ubuntu.Upstart"),
    }
    guest = vmprovision.inspect(make_tree(tmp_path, files))
    assert (guest.init.system, guest.init.pid1) == (None, "upstart")  # it has no jobs
    make_tree(tmp_path, {"/etc/init/rc.conf": "start on runlevel\n"})
    guest = vmprovision.inspect(tmp_path)
    assert (guest.init.system, guest.init.pid1) == ("upstart", "upstart")


@pytest.mark.parametrize(
    ("content", "program"),
    [
        (b"BusyBox v1.36.1 ... /etc/inittab", "busybox"),
        (b"com.ubuntu.Upstart /etc/inittab", "upstart"),
        (b"INIT: version %s booting /etc/inittab", "sysvinit"),
        (b"/etc/runit/1", "runit"),
        (b"/run/runit.stopit", "runit"),
        (b"libsystemd-core-257.so", "systemd"),
        (b"org.freedesktop.systemd1 /etc/inittab", "systemd"),
        (b"/etc/dinit.d/boot", "dinit"),
        (b"/etc/finit.conf", "finit"),
        (b"nothing", "unknown"),
    ],
)
def test_a_plain_program_is_told_by_what_it_contains(
    tmp_path: Path, content: bytes, program: str
) -> None:
    """/sbin/init that is no link says by its strings what it is."""
    assert pid1_of(tmp_path, {"/sbin/init": elf(content=content)}) == program


def test_a_plain_program_is_told_by_its_package(tmp_path: Path) -> None:
    """Dpkg's file list names the owner, also where usr-merge moved the file."""
    files: Tree = {
        "/usr/sbin/init": elf(content=b"x"),
        "/sbin": Link("usr/sbin"),
        "/var/lib/dpkg/info/sysvinit-core.list": "/.\n/sbin\n/sbin/init\n",
    }
    assert pid1_of(tmp_path, files) == "sysvinit"


def test_the_kernel_command_line_decides(tmp_path: Path) -> None:
    """``init=`` in the boot loader's default entry comes before /sbin/init."""
    files: Tree = {
        **SYSTEMD_TREE,
        "/usr/bin/runit-init": elf(),
        "/boot/grub/grub.cfg": "menuentry 'a' {\n linux /vmlinuz root=/dev/vda1 "
        "init=/usr/bin/runit-init quiet\n}\nmenuentry 'b' {\n linux /vmlinuz init=/sbin/init\n}\n",
    }
    guest = vmprovision.inspect(make_tree(tmp_path, files))
    assert guest.init.pid1 == "runit"
    assert any("/boot/grub/grub.cfg" in sentence for sentence in guest.init.evidence)


def test_a_commented_option_and_rdinit_do_not_count(tmp_path: Path) -> None:
    """Only ``init=`` itself, in a line that is in force."""
    files: Tree = {
        **SYSTEMD_TREE,
        "/boot/extlinux/extlinux.conf": "# append init=/bin/sh\nlabel a\n append rdinit=/bin/sh\n",
    }
    assert pid1_of(tmp_path, files) == "systemd"


def test_a_guest_without_init_may_be_dracuts_systemd(tmp_path: Path) -> None:
    """An initramfs of dracut starts systemd where no /sbin/init is there; that is likely only."""
    files: Tree = {key: what for key, what in SYSTEMD_TREE.items() if key != "/usr/sbin/init"}
    guest = vmprovision.inspect(make_tree(tmp_path, files))
    assert (guest.init.system, guest.init.confidence) == ("systemd", "likely")


def test_busybox_runs_what_its_inittab_says(tmp_path: Path) -> None:
    """BusyBox with an inittab of its own runs the services itself, hooked there."""
    guest = vmprovision.inspect(make_tree(tmp_path, BUSYBOX_TREE))
    assert (guest.init.system, guest.init.pid1) == ("busybox", "busybox")
    assert str(guest.init.hook) == "/etc/inittab"


def test_busybox_that_starts_openrc_does_not_run_services_itself(tmp_path: Path) -> None:
    """Alpine's services are OpenRC's, where OpenRC is there."""
    inittab = "::sysinit:/sbin/openrc sysinit\n::wait:/sbin/openrc default\n"
    tree: Tree = {**BUSYBOX_TREE, "/etc/inittab": inittab}
    without = vmprovision.inspect(make_tree(tmp_path / "without", tree))
    assert without.init.system == "busybox"
    with_openrc = vmprovision.inspect(make_tree(tmp_path / "with", {**tree, "/sbin/openrc": elf()}))
    assert with_openrc.init.system == "openrc"


SYSVINIT: Tree = {
    "/etc/os-release": OS_RELEASE,
    "/sbin/init": elf(content=b"INIT: version %s booting /etc/inittab"),
}


@pytest.mark.parametrize(
    ("files", "system", "dialect"),
    [
        (
            {"/etc/inittab": "rc:2345:wait:/etc/rc.d/rc.M\n", "/etc/rc.d/rc.M": "#!/bin/sh\n"},
            "slackware",
            "",
        ),
        (
            {
                "/etc/inittab": "l3:3:wait:/etc/init.d/rc 3\n",
                "/etc/init.d/rc3.d": None,
                "/etc/rc.d": Link("init.d"),
            },
            "sysv",
            "suse",
        ),
        (
            {"/etc/inittab": "l3:3:wait:/etc/rc.d/init.d/rc 3\n", "/etc/rc.d/init.d": None},
            "sysv",
            "redhat",
        ),
        (
            {"/sbin/init": elf(content=b"/etc/preinit"), "/etc/rc.common": "#!/bin/sh\n"},
            "procd",
            "",
        ),
        ({"/etc/inittab": "rc:2:wait:/etc/rc.multi\n"}, None, ""),
    ],
)
def test_sysvinit_runs_what_its_inittab_says(
    tmp_path: Path, files: Tree, system: str | None, dialect: str
) -> None:
    """Slackware, SUSE, Linux From Scratch and OpenWrt are told apart; others are not guessed."""
    verdict = vmprovision.inspect(make_tree(tmp_path, {**SYSVINIT, **files})).init
    assert (verdict.system, verdict.dialect) == (system, dialect)


def test_the_caller_may_know_better(tmp_path: Path) -> None:
    """--init standalone on a systemd guest hooks its rc.local, following its link."""
    files: Tree = {
        **SYSTEMD_TREE,
        "/etc/rc.local": Link("rc.d/rc.local"),
        "/etc/rc.d/rc.local": "#!/bin/sh\n",
    }
    guest = vmprovision.inspect(make_tree(tmp_path, files), init="standalone")
    assert (guest.init.system, guest.init.confidence) == ("standalone", "told")
    assert str(guest.init.hook) == "/etc/rc.d/rc.local"


def test_an_ostree_system_without_a_deployment_is_refused(tmp_path: Path) -> None:
    """Its root is inside a deployment; what would be written beside it is lost."""
    files: Tree = {"/etc/os-release": "ID=fedora\n", "/ostree/deploy/fedora": None}
    make_tree(tmp_path, {**files, "/sbin/init": elf()})
    with pytest.raises(vmprovision.UnsupportedGuestError, match="OSTree") as caught:
        vmprovision.inspect(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["centos6", "ubuntu14.04-i386", "gentoo2.0.1-openrc"])
def test_real_trees_without_programs_are_never_guessed(name: str) -> None:
    """A tree of /etc alone says nothing of PID 1, and inject refuses instead of guessing."""
    tree = REAL_ETC / name
    assert vmprovision.inspect(tree).init.system is None
    with pytest.raises(vmprovision.VmprovisionError, match="init"):
        vmprovision.plan(tree)


def test_busybox_inittab_may_be_a_link(tmp_path: Path) -> None:
    """A linked inittab of any name gets an inittab line, not a shell script."""
    tree = {**BUSYBOX_TREE, "/etc/inittab": Link("/data/boot"), "/data/boot": "::sysinit:/etc/rc\n"}
    make_tree(tmp_path, tree)
    vmprovision.inject(tmp_path)
    lines = (tmp_path / "data/boot").read_text().splitlines()
    assert "null::respawn:/usr/local/bin/guest-agent" in "\n".join(lines)
    assert "sleep" not in "\n".join(lines)


S6_IMAGE = "/etc/s6-linux-init/current/run-image/service"
SHELL, EXECLINE = b"#!/bin/sh\n", b"#!/usr/bin/execlineb -P\n"


@pytest.mark.parametrize(
    ("script", "folder", "hook"),
    [
        (SHELL + b"exec s6-svscan -t0 /service </dev/null\n", "/service", "/service"),
        (SHELL + b"exec env -i /usr/bin/s6-svscan '/etc/s6/sv'\n", "/etc/s6/sv", "/etc/s6/sv"),
        (EXECLINE + b"cd /\ns6-svscan -- /var/service\n", "/data/sv", "/data/sv"),
        # its directory is made at each boot: as a copy of the usual image, or it is not known how
        (SHELL + b"exec s6-svscan /run/service\n", S6_IMAGE, S6_IMAGE),
        (SHELL + b"exec s6-svscan /var/run/service\n", "/run/service", None),
        (
            SHELL + b"cp -a /etc/s6/image/. /run/\nexec s6-svscan /run/service\n",
            "/etc/s6/image/service",
            "/etc/s6/image/service",
        ),
        (
            EXECLINE + b'if { /bin/cp -a "/etc/s6/scan" /run }\ns6-svscan /run/scan\n',
            "/etc/s6/scan",
            "/etc/s6/scan",
        ),
        # it is copied to somewhere else, or nothing says that it is copied
        (SHELL + b"cp -a /etc/s6 /run\nexec s6-svscan /run/scan\n", "/etc/s6/service", None),
        (SHELL + b"ls /etc/s6\nexec s6-svscan /run/scan\n", "/etc/s6/scan", None),
        # it only starts it beside what it becomes
        (SHELL + b"s6-svscan /service &\nexec /usr/bin/busybox init\n", "/service", None),
    ],
)
def test_a_script_says_which_directory_s6_watches(
    tmp_path: Path, script: bytes, folder: str, hook: str | None
) -> None:
    """The service goes into that directory where the disk has it."""
    files: Tree = {
        "/etc/os-release": OS_RELEASE,
        "/sbin/init": Program(script),
        "/usr/bin/s6-svscan": elf(),
        "/usr/bin/busybox": elf(content=b"BusyBox v1"),
        "/var/service": Link("/data/sv"),
        "/var/run": Link("/run"),
        folder: None,
    }
    init = vmprovision.inspect(make_tree(tmp_path, files)).init
    assert (init.system, init.hook and str(init.hook)) == ("s6" if hook else None, hook)
