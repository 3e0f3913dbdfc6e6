"""A freshly installed Debian for tests: a folder with processes, mounts and devices of its own.

It is entered with pivot_root(2) and not with chroot(2): in a chroot no user may make a
user namespace, and building an image from a recipe needs one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conftest import require, require_root
from vmprovision.host.cache import cache_directory
from vmprovision.host.mirrors import host_mirrors

if TYPE_CHECKING:
    from collections.abc import Mapping

USER = "ci"
INSTALL_SECONDS = 1800.0
MEMBERS = "ca-certificates,sudo"
# What the machine takes from this host, so that it reaches the same networks.
SHARED = ("etc/resolv.conf", "etc/hosts", "etc/pip.conf", "etc/ssl/certs/ca-certificates.crt")
PASSED_ON = ("_proxy", "_PROXY", "SSL_CERT_", "PIP_", "REQUESTS_CA_BUNDLE")
ENTER = """
set -eu
root=$1 kvm=$2 user=$3 script=$4
mount --bind "$root" "$root"
cd "$root"
mount -t proc proc proc
mount --rbind /sys sys
mount -t tmpfs -o mode=755 dev dev
for name in null zero full random urandom tty; do
    touch "dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
[ "$kvm" = no ] || mknod -m 666 dev/kvm c 10 232
pivot_root . mnt
umount -l mnt
cd "$(getent passwd "$user" | cut -d: -f6)"
exec setpriv --reuid="$user" --regid="$user" --init-groups bash -c "$script"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A Debian in a folder.

    Attributes:
        root: the folder.
        kvm: whether it has a ``/dev/kvm``, which every user may open.
    """

    root: Path
    kvm: bool = False

    @property
    def home(self) -> Path:
        """The folder of its user, on this host."""
        return self.root / "home" / USER

    def run(
        self,
        script: str,
        *,
        user: str = USER,
        check: bool = True,
        timeout: float = INSTALL_SECONDS,
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of bash in the home of a user; return it finished, with its output.

        Raises:
            AssertionError: it failed, and ``check`` is set.
        """
        own = {name: value for name, value in os.environ.items() if _is_passed_on(name)}
        home = "/root" if user == "root" else f"/home/{user}"
        path = f"{home}/.local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        own |= {"HOME": home, "USER": user, "PATH": path, "LC_ALL": "C.UTF-8"}
        own |= variables or {}
        unshare = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        kvm = "yes" if self.kvm else "no"
        done = subprocess.run(
            [*unshare, "sh", "-c", ENTER, "sh", self.root, kvm, user, script],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=timeout,
            env=own,
        )
        if check:
            assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done


def _is_passed_on(name: str) -> bool:
    return any(part in name for part in PASSED_ON)


def make_machine(suite: str, root: Path, *, kvm: bool = False) -> Machine:
    """Return a fresh Debian of this suite, whose user may use sudo; skip without root."""
    require_root()
    require(shutil.which("mmdebstrap"), "mmdebstrap is not installed")
    archive = _base(suite)
    root.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", root], check=True)
    for name in SHARED:
        if Path("/", name).exists():
            target = root / name
            target.unlink(missing_ok=True)
            shutil.copyfile(Path("/", name), target)
    machine = Machine(root=root, kvm=kvm)
    machine.run(
        # as in Debian's container images: dpkg does not sync every file
        "echo force-unsafe-io >/etc/dpkg/dpkg.cfg.d/speed && "
        f"useradd --create-home --shell /bin/bash {USER} && "
        f"echo '{USER} ALL=(ALL) NOPASSWD:SETENV: ALL' >/etc/sudoers.d/{USER}",
        user="root",
    )
    return machine


def _base(suite: str) -> Path:
    """Return an archive with the essential packages of a suite, which the cache keeps."""
    archive = cache_directory() / "tests" / f"machine-{suite}.tar"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        making = archive.with_name(f"{archive.stem}-{os.getpid()}.tar")
        mirrors = host_mirrors(suite, updates=True)
        options = ["--quiet", "--mode=root", "--variant=minbase", f"--include={MEMBERS}"]
        subprocess.run(["mmdebstrap", *options, suite, making, *mirrors], check=True)
        making.rename(archive)
    return archive
