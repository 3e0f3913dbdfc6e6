"""The example of docs/examples: Debian's real Prometheus finds the agents by the server's list."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.debian import unpacked
from tests.server.conftest import serving
from tests.server.libvirt_host import wait_until
from tests.server.shown import insert_vm
from vmprovision.server.app import make_app
from vmprovision.server.limits import Gate

if TYPE_CHECKING:
    from vmprovision.server.services import Services

DOCS = Path(__file__).parents[2] / "docs"
CONFIGURATION = DOCS / "examples/prometheus.yml"


def test_the_page_shows_the_example() -> None:
    """docs/serve.md has the configuration of Prometheus as it is in the file."""
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "serve.md").read_text("utf-8"), re.DOTALL)
    assert CONFIGURATION.read_text("utf-8") in blocks


@pytest.mark.slow
def test_prometheus_finds_the_agents(services: Services, tmp_path: Path) -> None:
    """The example passes promtool, and Prometheus gets each agent with its labels by it.

    No guest runs, so the agents' addresses are of loopback and nobody answers there.
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
        with (
            (tmp_path / "log").open("wb") as log,
            subprocess.Popen(command, stdout=log, stderr=log) as process,
        ):
            try:
                found = wait_until("the targets", lambda: targets(port))
            finally:
                process.terminate()
    assert {target["labels"]["vm"]: target["scrapeUrl"] for target in found} == {
        name: f"http://{address}:8080/metrics" for name, address in addresses.items()
    }
    assert {each["discoveredLabels"]["__meta_vmprovision_tags"] for each in found} == {",a,b,"}


def targets(port: int) -> list[dict[str, Any]]:
    """Return what Prometheus scrapes; nothing while it does not answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with (
        contextlib.suppress(OSError),
        opener.open(f"http://127.0.0.1:{port}/api/v1/targets", timeout=10) as answer,
    ):
        found: list[dict[str, Any]] = json.load(answer)["data"]["activeTargets"]
        return found
    return []
