"""OSTree guests, made by ostree(1) itself: which deployment boots, and what is written to it."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.conftest import require
from tests.trees import OS_RELEASE, Link, Tree, elf, make_tree, python_tree, tree_state
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.filesystem.local import LocalFilesystem
from vmprovision.inspection.ostree import enter_deployment, find_boot_files
from vmprovision.progress import Control

if TYPE_CHECKING:
    from collections.abc import Iterator

# As ostree's manual has it ("Adapting existing mainstream distributions").
COMMIT_TREE: Tree = {
    "/usr/etc/os-release": OS_RELEASE,
    "/usr/etc/systemd/system/multi-user.target.wants": None,
    "/usr/lib/systemd/systemd": elf(),
    "/usr/lib/systemd/system/multi-user.target": "[Unit]\n",
    "/usr/lib/systemd/system/default.target": Link("multi-user.target"),
    "/usr/sbin/init": Link("../lib/systemd/systemd"),
    "/usr/lib/modules/6.1.0/vmlinuz": "a kernel",
    "/usr/lib/modules/6.1.0/initramfs.img": "an initramfs",
    "/usr/local": Link("../var/usrlocal"),
    **python_tree(),
    "/bin": Link("usr/bin"),
    "/sbin": Link("usr/sbin"),
    "/lib": Link("usr/lib"),
    "/ostree": Link("sysroot/ostree"),
    **dict.fromkeys(("/sysroot", "/var", "/boot", "/proc", "/run", "/dev", "/sys")),
}
SERVICE = "etc/systemd/system/guest-agent.service"


@dataclass(frozen=True)
class Sysroot:
    """A disk's root directory with an OSTree system on it."""

    root: Path

    def admin(self, *words: str) -> str:
        """Run ``ostree admin`` on it."""
        command = ["ostree", "admin", words[0], f"--sysroot={self.root}", *words[1:]]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def deploy(self, tree: Path) -> Path:
        """Commit a tree and deploy it, to boot next; return the deployment."""
        before = set(self.deployments())
        repository = f"--repo={self.root}/ostree/repo"
        owner = ("--owner-uid=0", "--owner-gid=0")
        commit = ["ostree", "commit", repository, "-b", "test", *owner, str(tree)]
        subprocess.run(commit, check=True, capture_output=True)
        self.admin("deploy", "--os=debian", "test", "--karg=root=UUID=1")
        (new,) = set(self.deployments()) - before
        return new

    def deployments(self) -> list[Path]:
        """Give the directories of all deployments."""
        folder = self.root / "ostree/deploy/debian/deploy"
        return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []

    @property
    def var(self) -> Path:
        """The directory that every deployment of the system has as ``/var``."""
        return self.root / "ostree/deploy/debian/var"


@pytest.fixture
def sysroot(tmp_path: Path) -> Iterator[Sysroot]:
    """Return an empty OSTree system."""
    require(shutil.which("ostree"), "ostree is not installed")
    require(os.geteuid() == 0, "ostree makes systems as root only")
    made = Sysroot(tmp_path / "disk")
    made.root.mkdir()
    subprocess.run(["ostree", "admin", "init-fs", str(made.root)], check=True, capture_output=True)
    made.admin("os-init", "debian")
    yield made
    for path in made.deployments():  # they cannot be changed, and so not be removed
        subprocess.run(["chattr", "-i", str(path)], check=False)


def test_the_deployment_that_boots_gets_the_agent(sysroot: Sysroot, tmp_path: Path) -> None:
    """Its /etc and the system's /var do, nothing else is touched, and removing restores all."""
    deployment = sysroot.deploy(make_tree(tmp_path / "tree", COMMIT_TREE))
    before = tree_state(sysroot.root)
    report = vmprovision.inject(sysroot.root, vmprovision.InjectOptions(vm_id="web-1"))
    assert report.guest.distribution.id == "debian"
    assert report.guest.init.system == "systemd"
    new = set(tree_state(sysroot.root)) - set(before)
    inside = str(deployment.relative_to(sysroot.root))
    places = (f"{inside}/etc/", "ostree/deploy/debian/var/usrlocal")
    assert new
    assert all(path.startswith(places) for path in new)
    assert (sysroot.var / "usrlocal/bin/guest-agent").stat().st_mode & 0o777 == 0o755
    link = deployment / "etc/systemd/system/multi-user.target.wants/guest-agent.service"
    assert str(link.readlink()) == f"/{SERVICE}"
    assert vmprovision.verify(sysroot.root).mismatches == ()
    assert vmprovision.inject(sysroot.root).changed == ()
    vmprovision.remove(sysroot.root)
    assert tree_state(sysroot.root) == before


def test_the_agent_survives_an_upgrade(sysroot: Sysroot, tmp_path: Path) -> None:
    """`ostree admin deploy` merges /etc: the next deployment has the service, and is the guest."""
    tree = make_tree(tmp_path / "tree", COMMIT_TREE)
    first = sysroot.deploy(tree)
    vmprovision.inject(sysroot.root, vmprovision.InjectOptions(vm_id="web-1"))
    (tree / "usr/etc/os-release").write_text(OS_RELEASE.replace('"12"', '"13"'))
    second = sysroot.deploy(tree)
    assert (second / SERVICE).read_bytes() == (first / SERVICE).read_bytes()
    guest = vmprovision.inspect(sysroot.root)
    assert guest.distribution.version == "13"
    assert guest.agent is not None
    assert vmprovision.verify(sysroot.root).mismatches == ()
    vmprovision.inject(sysroot.root, vmprovision.InjectOptions(vm_id="web-2"))
    assert "web-2" in (second / "etc/guest-agent.conf").read_text()
    assert "web-1" in (first / "etc/guest-agent.conf").read_text()


@pytest.mark.parametrize("named", ["ostree-{}.conf", "ostree-{}+3.conf", "ostree-{}+2-1.conf"])
def test_newer_names_of_boot_entries_are_understood(
    named: str, sysroot: Sysroot, tmp_path: Path
) -> None:
    """Since ostree 2024.5 an entry's name lacks the system's; since 2025.3 it may count tries."""
    tree = make_tree(tmp_path / "tree", COMMIT_TREE)
    sysroot.deploy(tree)
    (tree / "usr/etc/os-release").write_text(OS_RELEASE.replace('"12"', '"13"'))
    sysroot.deploy(tree)
    entries = sysroot.root / "boot/loader/entries"
    for number in (1, 2):
        (entries / f"ostree-{number}-debian.conf").rename(entries / named.format(number))
    assert vmprovision.inspect(sysroot.root).distribution.version == "13"


def test_the_entry_that_boots_names_its_kernel(sysroot: Sysroot, tmp_path: Path) -> None:
    """``prove`` can start a guest whose boot loader is not in the image."""
    sysroot.deploy(make_tree(tmp_path / "tree", COMMIT_TREE))
    guest = enter_deployment(LocalFilesystem(sysroot.root))
    entry = find_boot_files(guest)
    assert entry is not None
    assert "root=UUID=1" in entry.options.split()
    for path, content in ((entry.kernel, b"a kernel"), (entry.initrd, b"an initramfs")):
        assert guest.read(PurePosixPath("/boot") / path.lstrip("/"), limit=100) == content


def test_several_deployments_without_a_boot_entry_are_refused(
    sysroot: Sysroot, tmp_path: Path
) -> None:
    """One alone is known without; of two nothing says which boots, and nothing is written."""
    tree = make_tree(tmp_path / "tree", COMMIT_TREE)
    sysroot.deploy(tree)
    loader, aside = sysroot.root / "boot/loader.1", tmp_path / "loader"
    loader.rename(aside)
    assert vmprovision.inspect(sysroot.root).init.system == "systemd"
    (sysroot.root / "sbin").mkdir()
    (sysroot.root / "sbin/init").write_text("the disk's own system\n")
    with pytest.raises(vmprovision.UnsupportedGuestError, match="/sbin/init and OSTree"):
        vmprovision.inspect(sysroot.root)
    shutil.rmtree(sysroot.root / "sbin")
    aside.rename(loader)
    (tree / "usr/etc/os-release").write_text("ID=other\n")
    sysroot.deploy(tree)
    for loader in sysroot.root.glob("boot/loader.*"):
        shutil.rmtree(loader)
    with pytest.raises(vmprovision.UnsupportedGuestError, match="2 OSTree deployments"):
        vmprovision.inject(sysroot.root)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"/usr/local/bin": None}, "/usr/local is a part of /usr"),
        (
            {"/usr/lib/ostree/prepare-root.conf": "[etc]\ntransient = true\n"},
            "/usr/lib/ostree/prepare-root.conf",
        ),
        ({"/usr/etc/fstab": "nas:/var /var nfs defaults 0 0\n"}, "nas:/var"),
    ],
)
def test_a_deployment_that_would_not_keep_the_agent_is_refused(
    files: Tree, message: str, sysroot: Sysroot, tmp_path: Path
) -> None:
    """The cause is named, and nothing is written."""
    kept = {path: what for path, what in COMMIT_TREE.items() if path not in parents(files)}
    sysroot.deploy(make_tree(tmp_path / "tree", {**kept, **files}))
    before = tree_state(sysroot.root)
    with pytest.raises(vmprovision.UnsupportedGuestError, match=message):
        vmprovision.inject(sysroot.root)
    assert tree_state(sysroot.root) == before


def parents(files: Tree) -> set[str]:
    """Give the directories above these files."""
    return {str(parent) for path in files for parent in Path(path).parents}


@pytest.mark.appliance
def test_a_disk_with_a_deployment_is_injected(sysroot: Sysroot, tmp_path: Path) -> None:
    """On an ext4 filesystem in an image: the same places, and the deployment stays immutable."""
    deployment = sysroot.deploy(make_tree(tmp_path / "tree", COMMIT_TREE))
    inside = f"/{deployment.relative_to(sysroot.root)}"
    tar, disk = tmp_path / "disk.tar", tmp_path / "disk.qcow2"
    subprocess.run(["tar", "-cf", str(tar), "-C", str(sysroot.root), "."], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "256M"], check=True)
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("mkfs", "ext4", "/dev/sda")
        appliance.call("mount", "/dev/sda", "/")
        appliance.call("tar_in", str(tar), "/")
        appliance.call("set_e2attrs", inside, "i")
        appliance.call("umount_all")
    assert vmprovision.inject(disk).changed
    assert vmprovision.verify(disk).mismatches == ()
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount_ro", "/dev/sda", "/")
        assert "i" in appliance.call("get_e2attrs", inside)
        assert appliance.call("is_file", f"{inside}/{SERVICE}")
        agent = "/ostree/deploy/debian/var/usrlocal/bin/guest-agent"
        assert appliance.call("is_file", agent)
        appliance.call("umount_all")


@pytest.mark.appliance
def test_boot_entries_on_a_filesystem_of_their_own_are_found(
    sysroot: Sysroot, tmp_path: Path
) -> None:
    """As on Fedora CoreOS: no fstab names /boot, and its entries say which deployment boots."""
    tree = make_tree(tmp_path / "tree", COMMIT_TREE)
    old = sysroot.deploy(tree)
    (tree / "usr/etc/os-release").write_text(OS_RELEASE.replace('"12"', '"13"'))
    new = sysroot.deploy(tree)
    tars = {"1": tmp_path / "boot.tar", "2": tmp_path / "root.tar"}
    boot, root = sysroot.root / "boot", sysroot.root
    subprocess.run(["tar", "-cf", str(tars["1"]), "-C", str(boot), "."], check=True)
    leave = "--exclude=./boot/*"
    subprocess.run(["tar", "-cf", str(tars["2"]), leave, "-C", str(root), "."], check=True)
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "256M"], check=True)
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("part_init", "/dev/sda", "gpt")
        appliance.call("part_add", "/dev/sda", "primary", 2048, 131071)
        appliance.call("part_add", "/dev/sda", "primary", 131072, -2048)
        for number, tar in tars.items():
            appliance.call("mkfs", "ext4", f"/dev/sda{number}")
            appliance.call("mount", f"/dev/sda{number}", "/")
            appliance.call("tar_in", str(tar), "/")
            appliance.call("umount_all")
    assert vmprovision.inject(disk).guest.distribution.version == "13"
    with open_appliance([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount_ro", "/dev/sda2", "/")
        for deployment, is_there in ((old, False), (new, True)):
            place = f"/{deployment.relative_to(sysroot.root)}/{SERVICE}"
            assert bool(appliance.call("is_file", place)) is is_there
        appliance.call("umount_all")
