"""Files of real guests, and what inspection and plan must return for each.

``tests/inspection/test_real_trees.py`` checks them, and the support matrix reports them.
Some are whole root filesystems.  Of others only ``/etc`` is real, and the programs
outside it are stand-ins.  The rest is laid out as its documentation says.
"""

from __future__ import annotations

import shutil
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import vmprovision
from tests.inspection import documented_trees
from tests.trees import REAL_ETC, Link, Program, Tree, elf, make_tree, python_tree, root_filesystem

if TYPE_CHECKING:
    from pathlib import Path

# as a guest's other programs are -> e_machine and bits (elf(5))
MACHINES = {"x86_64": (62, 64), "i386": (3, 32), "aarch64": (183, 64), "unknown": (62, 64)}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The verdict on a guest, and where the service's own files go."""

    system: str
    pid1: str
    dialect: str = ""
    planned: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RealTree:
    """One guest's files.

    Attributes:
        name: what a test of it is called.
        etc: the folder in ``tests/data/trees`` that holds its ``/etc``, if there is one.
        tarball: the name of its root filesystem, if there is one: tests/data/README.md.
            A tree with neither is laid out as its documentation says.
        programs: stand-ins for the files that etc and tarball lack.
        expected: what inspection and plan must return.
    """

    name: str
    etc: str = ""
    tarball: str = ""
    programs: Tree = field(default_factory=dict)
    expected: Seen


REDHAT_LINKS = (
    *(f"/etc/rc.d/rc{level}.d/K01guest-agent" for level in (0, 1, 6)),
    *(f"/etc/rc.d/rc{level}.d/S99guest-agent" for level in (2, 3, 4, 5)),
)
OPENRC_FILES = ("/etc/init.d/guest-agent", "/etc/runlevels/default/guest-agent")
DINIT_FILES = ("/etc/dinit.d/guest-agent", "/etc/dinit.d/boot.d/guest-agent")
# Its inittab names OpenRC, which is not there, so BusyBox's init respawns the agent.
ALPINE_WITHOUT_OPENRC = Seen(system="busybox", pid1="busybox", planned=("/etc/inittab",))

REAL_TREES = (
    # init.d and rcN.d are links into rc.d, and Upstart runs the runlevels' scripts
    RealTree(
        name="centos-6",
        etc="centos6",
        programs={"/sbin/init": elf(content=b"com.ubuntu.Upstart")},
        expected=Seen(
            system="sysv",
            pid1="upstart",
            dialect="redhat",
            planned=("/etc/rc.d/init.d/guest-agent", *REDHAT_LINKS),
        ),
    ),
    # it has init.d, rcN.d and systemd's directories too; Upstart is what runs it
    RealTree(
        name="ubuntu-14.04",
        etc="ubuntu14.04-i386",
        programs={
            "/sbin/init": elf(3, bits=32, content=b"com.ubuntu.Upstart"),
            "/etc/systemd/system": None,
            "/lib/systemd/systemd": elf(3, bits=32),
        },
        expected=Seen(system="upstart", pid1="upstart", planned=("/etc/init/guest-agent.conf",)),
    ),
    # of 2011: its inittab starts /sbin/rc, and its scripts are runscript's
    RealTree(
        name="gentoo-2.0.1",
        etc="gentoo2.0.1-openrc",
        programs={
            "/sbin/init": elf(content=b"INIT: version booting /etc/inittab"),
            "/sbin/rc": elf(),
            "/sbin/runscript": elf(),
        },
        expected=Seen(system="openrc", pid1="sysvinit", dialect="runscript", planned=OPENRC_FILES),
    ),
    RealTree(
        name="alpine-3.2",
        tarball="alpine-3.2-openrc.tar.xz",
        expected=Seen(system="openrc", pid1="busybox", dialect="openrc-run", planned=OPENRC_FILES),
    ),
    *(
        RealTree(
            name=f"alpine-{version}",
            tarball=f"alpine-minirootfs-{version}.tar.gz",
            expected=ALPINE_WITHOUT_OPENRC,
        )
        for version in ("3.8.5-x86_64", "3.20.3-x86_64", "3.20.3-aarch64")
    ),
    RealTree(
        name="chimera-dinit",
        programs=documented_trees.CHIMERA,
        expected=Seen(system="dinit", pid1="dinit", planned=DINIT_FILES),
    ),
    RealTree(
        name="dinit-example",
        programs=documented_trees.DINIT_EXAMPLE,
        expected=Seen(system="dinit", pid1="dinit", planned=DINIT_FILES),
    ),
    RealTree(
        name="artix-dinit",
        programs=documented_trees.ARTIX_DINIT,
        expected=Seen(system="dinit", pid1="dinit", planned=DINIT_FILES),
    ),
    RealTree(
        name="s6-linux-init",
        programs=documented_trees.S6_MAKER,
        expected=Seen(
            system="s6",
            pid1="s6",
            dialect="scandir",
            planned=("/etc/s6-linux-init/current/run-image/service/guest-agent/run",),
        ),
    ),
    RealTree(
        name="artix-s6",
        programs=documented_trees.ARTIX_S6,
        expected=Seen(
            system="s6",
            pid1="s6",
            dialect="scandir",
            planned=("/etc/s6/current/run-image/service/guest-agent/run",),
        ),
    ),
    RealTree(
        name="openwrt",
        programs=documented_trees.OPENWRT,
        expected=Seen(
            system="procd",
            pid1="procd",
            planned=(
                "/etc/init.d/guest-agent",
                "/etc/rc.d/K01guest-agent",
                "/etc/rc.d/S99guest-agent",
            ),
        ),
    ),
    RealTree(
        name="slackware-15",
        programs=documented_trees.SLACKWARE,
        expected=Seen(
            system="slackware",
            pid1="sysvinit",
            planned=(
                "/etc/rc.d/rc.guest-agent",
                "/etc/rc.d/rc.local_shutdown",
                "/etc/rc.d/rc.local",
            ),
        ),
    ),
    RealTree(
        name="sles-11",
        programs=documented_trees.SLES_11,
        expected=Seen(
            system="sysv",
            pid1="sysvinit",
            dialect="suse-startpar",
            planned=(
                "/etc/init.d/guest-agent",
                *(f"/etc/init.d/rc{level}.d/K01guest-agent" for level in (3, 5)),
                *(f"/etc/init.d/rc{level}.d/S99guest-agent" for level in (3, 5)),
                "/etc/init.d/.depend.stop",
                "/etc/init.d/.depend.start",
            ),
        ),
    ),
    RealTree(
        name="void",
        programs=documented_trees.VOID,
        expected=Seen(
            system="runit",
            pid1="runit",
            dialect="usual",
            planned=(
                "/etc/sv/guest-agent/run",
                "/etc/sv/guest-agent/supervise",
                "/etc/runit/runsvdir/default/guest-agent",
            ),
        ),
    ),
)


def assemble(tree: RealTree, target: Path) -> Path | None:
    """Make the guest's files in a new directory; None if its root filesystem is not here."""
    if tree.tarball:
        archive = root_filesystem(tree.tarball)
        if archive is None:
            return None
        _unpack(archive, target)
    elif tree.etc:
        shutil.copytree(REAL_ETC / tree.etc, target, symlinks=True)
    else:
        target.mkdir()
    make_tree(target, tree.programs)
    machine, bits = MACHINES[vmprovision.inspect(target).arch]
    return make_tree(target, python_tree(machine=machine, bits=bits))


def _unpack(archive: Path, target: Path) -> None:
    """Unpack a root filesystem, without its devices."""
    target.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.isdir():
                (target / member.name).mkdir(parents=True, exist_ok=True)
            elif member.issym():
                make_tree(target, {member.name: Link(member.linkname)})
            elif content := tar.extractfile(member) if member.isfile() else None:
                make_tree(target, {member.name: Program(content.read())})


def look_at(root: Path) -> Seen:
    """Return what inspection and plan find in a guest's files."""
    plan = vmprovision.plan(root)
    described = plan.as_json()["operations"]
    paths = [o["path"] for o in described if o["operation"] != "MakeDirectory"]
    ours = ("/usr/local/", "/etc/guest-agent.conf")
    init = plan.guest.init
    return Seen(
        system=str(init.system),
        pid1=init.pid1,
        dialect=init.dialect,
        planned=tuple(path for path in paths if not path.startswith(ours)),
    )
