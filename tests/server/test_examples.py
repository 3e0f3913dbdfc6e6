"""The examples of docs/examples are run: an orchestrator, and Debian's real Prometheus."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.agent.agents import build_program
from tests.debian import unpacked
from tests.server.conftest import serving
from tests.server.libvirt_host import let_others_enter, libvirt_host, wait_until
from tests.server.shown import insert_vm
from vmprovision.progress import Control
from vmprovision.recipe import build_image
from vmprovision.server.app import make_app
from vmprovision.server.limits import Gate

if TYPE_CHECKING:
    from vmprovision.server.services import Services

DOCS = Path(__file__).parents[2] / "docs"
CONFIGURATION = DOCS / "examples/prometheus.yml"
ORCHESTRATOR = DOCS / "examples/orchestrator.py"
TEN_BOOTS_SECONDS = 1800.0  # at once, on two cores without KVM that others use
IMAGES = DOCS.with_name("images")
# The smallest guest, which boots in seconds without KVM, and like other images by itself. Its
# kernel does not take a busy host for a broken timer.
LIGHT = """\
description = "BusyBox as process 1, behind a boot loader"
extends = "busybox-standalone"
customise = "/usr/lib/initrd/booted"

[disk]
size_mb = 256
partition_table = "mbr"
features = ["^64bit", "^metadata_csum"]
bootloader = "extlinux"
command_line = "root=UUID=5b1a3c0e-0d3f-4c57-9a52-6f1d7d9a1202 ro console=ttyS0 no_timer_check"
"""
BOOTED = """\
#!/bin/busybox sh
set -eu
/usr/lib/initrd/guest
/bin/busybox ln -s boot/vmlinuz-* /vmlinuz
/bin/busybox ln -s boot/initrd.img-* /initrd.img
"""


def test_the_page_shows_the_example() -> None:
    """docs/serve.md has the configuration of Prometheus as it is in the file."""
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "serve.md").read_text("utf-8"), re.DOTALL)
    assert CONFIGURATION.read_text("utf-8") in blocks


@pytest.mark.slow
def test_prometheus_asks_the_agents(services: Services, tmp_path: Path) -> None:
    """The example passes promtool, and Prometheus gets each agent's metrics with its labels by it.

    No guest runs: the agents are two programs of this host, each at a loopback address.
    """
    programs = unpacked("prometheus") / "usr/bin"
    subprocess.run([programs / "promtool", "check", "config", CONFIGURATION], check=True)
    addresses = {"web": "127.77.0.1", "db": "127.77.0.2"}
    for name, address in addresses.items():
        insert_vm(services.store, name, guest_ip=address, tags=["a", "b"])
    insert_vm(services.store, "not-reported", "started")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(Gate(make_app(services), services.settings)) as url:
        config = tmp_path / "prometheus.yml"
        config.write_text(CONFIGURATION.read_text().replace("http://127.0.0.1:8080", url))
        command: list[str | Path] = [
            programs / "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with (tmp_path / "log").open("wb") as log, contextlib.ExitStack() as stack:
            program = build_program(tmp_path)
            (tmp_path / "empty.conf").touch()
            for each in (command, *(agent_command(program, ip) for ip in addresses.values())):
                process = subprocess.Popen(each, stdout=log, stderr=log)
                stack.callback(process.wait)
                stack.callback(process.terminate)
            found = wait_until("answers", lambda: targets(port, health="up", count=2))
            memory = query(port, "node_memory_MemTotal_bytes")
    assert {target["labels"]["vm"]: target["scrapeUrl"] for target in found} == {
        name: f"http://{address}:8080/metrics" for name, address in addresses.items()
    }
    assert {each["discoveredLabels"]["__meta_vmprovision_tags"] for each in found} == {",a,b,"}
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory == dict.fromkeys(addresses, total)


@pytest.mark.slow
@pytest.mark.appliance
@pytest.mark.boot
def test_the_orchestrator_creates_ten_machines(tmp_path: Path) -> None:
    """Each is a domain of libvirt with an address of its own, at which its agent answers."""
    let_others_enter(tmp_path)  # QEMU has a user of its own
    base, machines = tmp_path / "base.qcow2", tmp_path / "machines"
    build_light_guest(tmp_path / "recipes", base)
    before = base.read_bytes()
    machines.mkdir()
    with libvirt_host(tmp_path / "host") as host:
        begun = time.monotonic()
        done = subprocess.run(
            host.enter(sys.executable, ORCHESTRATOR, base, machines, "qemu"),
            capture_output=True,
            check=False,
            text=True,
            timeout=TEN_BOOTS_SECONDS,
        )
        print(f"ten machines: {time.monotonic() - begun:.0f} s")  # noqa: T201 -- pytest -s shows it
        domains = host.domains()
    assert done.returncode == 0, done.stderr
    answers = [line.split() for line in done.stdout.splitlines()]
    names = {name for name, _, _ in answers}
    assert names == {f"machine-{number}" for number in range(1, 11)} == set(domains)
    assert len({url for _, url, _ in answers}) == len(names)
    assert {status for _, _, status in answers} == {"healthy"}
    assert base.read_bytes() == before


def build_light_guest(recipes: Path, image: Path) -> None:
    """Build a small guest with a boot loader."""
    shutil.copytree(IMAGES, recipes)
    script = recipes / "busybox-booted/files/usr/lib/initrd/booted"
    script.parent.mkdir(parents=True)
    script.write_text(BOOTED)
    script.chmod(0o755)
    (recipes / "busybox-booted/recipe.toml").write_text(LIGHT)
    build_image("busybox-booted", output=image, control=Control(), recipes=recipes)
    image.chmod(0o644)


def agent_command(program: Path, address: str) -> list[str | Path]:
    """Return the command of an agent that listens on the port that the server expects."""
    config = program.with_name("empty.conf")
    where: list[str | Path] = ["--listen", address, "--port", "8080", "--config", config]
    return [sys.executable, program, *where]


def targets(port: int, *, health: str, count: int) -> list[dict[str, Any]]:
    """Return what Prometheus scrapes, once so many are in this state."""
    found: list[dict[str, Any]] = ask(port, "targets").get("activeTargets", [])
    return found if [each["health"] for each in found].count(health) == count else []


def query(port: int, name: str) -> dict[str, float]:
    """Return a metric's value for each machine."""
    answer = ask(port, f"query?query={name}")
    return {each["metric"]["vm"]: float(each["value"][1]) for each in answer["result"]}


def ask(port: int, path: str) -> dict[str, Any]:
    """Return what Prometheus answers; nothing while it does not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with (
        contextlib.suppress(OSError),
        opener.open(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=10) as answer,
    ):
        found: dict[str, Any] = json.load(answer)["data"]
        return found
    return {}
