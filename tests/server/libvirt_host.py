"""A libvirt of a test's own: daemons, network and machines in namespaces that end with it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tests.conftest import require

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 900.0  # a loaded host without KVM
POLL_SECONDS = 0.2
NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# The daemons find everything where they always do, and it is below the test's folder.
SCRIPT = """\
set -e
mkdir -p /run/libvirt "$1/run" "$1/etc" "$1/lib" "$1/log" "$1/cache"
cp -a /etc/libvirt/. "$1/etc/"
cp -a /var/lib/libvirt/. "$1/lib/"
mount --bind "$1/run" /run/libvirt
mount --bind "$1/etc" /etc/libvirt
mount --bind "$1/lib" /var/lib/libvirt
mount --bind "$1/log" /var/log/libvirt
mount --bind "$1/cache" /var/cache/libvirt
sed -i "s/192.168.122/$2/g" /etc/libvirt/qemu/networks/default.xml
# As udev has it: otherwise libvirt starts QEMU many times for each machine.
if [ -c /dev/kvm ] && [ "$(stat -c %G /dev/kvm)" != kvm ]; then
    cp -a /dev/kvm "$1/kvm"
    chgrp kvm "$1/kvm"
    chmod 660 "$1/kvm"
    mount --bind "$1/kvm" /dev/kvm
fi
ip link set lo up
eval "$3"
virtlogd -d -p /run/libvirt/virtlogd.pid
libvirtd -d -p /run/libvirt/libvirtd.pid
until virsh --quiet net-list --all >/dev/null 2>&1; do sleep 0.1; done
virsh --quiet net-start default
touch "$1/ready"
# process 1 must reap: libvirtd waits for machines that it has ended, and that nobody reaps
sleep infinity &
wait $!
"""


def wait_until(what: str, condition: Any, seconds: float = SECONDS) -> Any:  # noqa: ANN401 -- any true value
    """Return what a condition returns, once that is true."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(POLL_SECONDS)


def let_others_enter(folder: Path) -> None:
    """Let every user pass through a folder: pytest closes its folders to others."""
    for path in (folder, *folder.parents):
        if not path.stat().st_mode & 0o001:
            path.chmod(0o711)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii")
        return [int(word) for word in text.split()]
    return []


@dataclass(kw_only=True)
class LibvirtHost:
    """A private libvirt, with the network ``default``."""

    folder: Path
    init: int  # process 1 of its namespace, as this host numbers it

    @property
    def remote_uri(self) -> str:
        """The same for a server that takes it for another host's."""
        return self.uri.replace("qemu:", "qemu+unix:")

    @property
    def uri(self) -> str:
        """How libvirt's binding reaches it from outside of the namespaces."""
        return f"qemu:///system?socket={self.folder}/run/libvirt-sock"

    def enter(self, *command: str | Path) -> list[str]:
        """Return the command that runs another one inside."""
        inside = ["nsenter", f"--target={self.init}", "--net", "--mount", "--pid", "--"]
        return [*inside, *map(str, command)]

    def run(self, *command: str | Path, check: bool = True) -> str:
        """Run a command inside; return what it prints."""
        done = subprocess.run(
            self.enter(*command), capture_output=True, text=True, check=False, timeout=SECONDS
        )
        assert not check or done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}"
        return done.stdout

    def domains(self) -> list[str]:
        """Return the names of all domains."""
        return self.run("virsh", "--quiet", "list", "--all", "--name").split()


def require_namespaces() -> None:
    """Skip the test where no network of its own can be made, as in most containers."""
    can = (
        os.geteuid() == 0
        and not subprocess.run(
            ["unshare", *NAMESPACES, "true"], check=False, capture_output=True
        ).returncode
    )
    require(can, "only root can make namespaces, and most containers cannot", optional=True)


@contextlib.contextmanager
def libvirt_host(
    folder: Path, *, subnet: str = "192.168.122", first: str = ""
) -> Iterator[LibvirtHost]:
    """Give a private libvirt; nothing of it remains afterwards.

    Args:
        folder: gets its files; it must not exist.
        subnet: of its network, without the last number.
        first: a command of the shell that runs inside before libvirt starts.
    """
    require_namespaces()
    for program in ("libvirtd", "virtlogd", "virsh", "dnsmasq"):
        found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        require(found, f"{program} is not installed: ./bootstrap env")
    require(importlib.util.find_spec("libvirt"), "python3-libvirt is not installed")
    folder.mkdir(mode=0o755)
    log = folder / "daemons.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", *NAMESPACES, "sh", "-c", SCRIPT, "sh", str(folder), subnet, first],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            return (folder / "ready").exists()

        wait_until("libvirtd", is_ready)
        (init,) = children(process.pid)
        yield LibvirtHost(folder=folder, init=init)
    finally:
        process.kill()  # the kernel kills everything in the namespace
        process.wait()


@dataclass(kw_only=True)
class Server:
    """``vmprovision serve`` in a process of its own, beside a private libvirt."""

    host: LibvirtHost
    state: Path
    images: Path
    options: list[str] = field(default_factory=list)
    name: str = "server"
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Where clients connect."""
        return self.state.with_name(f"{self.name}.sock")

    @property
    def log(self) -> Path:
        """What the server printed."""
        return self.state.with_name(f"{self.name}.log")

    def start(self) -> None:
        """Start it, and wait until clients can connect."""
        command = [sys.executable, "-m", "vmprovision", "-v", "serve"]
        command += ["--listen", f"unix:{self.socket}", "--state", str(self.state)]
        command += ["--images", str(self.images), "--jobs", "1", *self.options]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.host.enter(*command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        wait_until("the server", self._answers)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(httpx.TransportError), self.client() as client:
            return client.get("/health").status_code == 200
        return False

    def client(self) -> httpx.Client:
        """Return a client."""
        # reading the host's certificates, which no Unix socket needs, takes 0.1 s of a processor
        transport = httpx.HTTPTransport(uds=str(self.socket), verify=False)
        return httpx.Client(transport=transport, base_url="http://localhost", timeout=SECONDS)

    @property
    def number(self) -> int:
        """The number of its process, as its namespace has it."""
        assert self.process is not None
        (pid,) = children(self.process.pid)
        (line,) = re.findall("^NSpid:(.*)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return int(line.split()[-1])

    def send(self, number: signal.Signals) -> None:
        """Send the server a signal."""
        assert self.process is not None
        for pid in children(self.process.pid):
            os.kill(pid, number)

    def end(self, number: signal.Signals) -> None:
        """Send the server a signal, and wait for its end."""
        assert self.process is not None
        self.send(number)
        self.process.send_signal(signal.SIGCONT)  # nsenter stops when its child is stopped
        self.process.wait(SECONDS)
        self.process = None

    def stop(self) -> None:
        """Stop it, if it runs."""
        if self.process is not None:
            self.end(signal.SIGTERM)

    def create(self, name: str, template: str = "busybox") -> str:
        """Create a VM; return its id."""
        with self.client() as client:
            made = client.post("/v1/vms", json={"name": name, "template_id": template})
            assert made.status_code == 202, made.text
            return str(made.json()["id"])

    def delete(self, *ids: str) -> None:
        """Delete VMs, and wait until they are gone."""
        with self.client() as client:
            for vm_id in ids:
                client.delete(f"/v1/vms/{vm_id}")
            for vm_id in ids:
                path = f"/v1/vms/{vm_id}"
                wait_until("the end", lambda path=path: client.get(path).status_code == 404)

    def vm(self, vm_id: str) -> dict[str, Any]:
        """Return a VM."""
        with self.client() as client:
            found: dict[str, Any] = client.get(f"/v1/vms/{vm_id}").json()["item"]
            return found

    def in_phase(self, vm_id: str, *phases: str) -> dict[str, Any]:
        """Wait until a VM is in one of these phases; return it."""

        def look() -> dict[str, Any] | None:
            item = self.vm(vm_id)
            assert item["state"] != "failed" or "silent" in phases, json.dumps(item, indent=1)
            return item if item["phase"] in phases else None

        found: dict[str, Any] = wait_until(f"phase {phases}", look)
        return found

    def register(self, name: str, image: Path, **spec: object) -> str:
        """Register an image as a template, and wait until it is ready; return its id."""
        body = {"name": name, "spec": {"rootfs_path": str(image), "mem_mib": 128, **spec}}
        with self.client() as client:
            made = client.post("/v1/templates", json=body)
            assert made.status_code == 201, made.text
            path = f"/v1/templates/{made.json()['id']}"

            def is_ready() -> bool:
                item = client.get(path).json()["item"]
                assert item["state"] != "failed", item["error"]
                return bool(item["state"] == "ready")

            wait_until("the template", is_ready)
            return str(made.json()["id"])


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Run a server in the block."""
    try:
        server.start()
        yield server
    finally:
        server.stop()
