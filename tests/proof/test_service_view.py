"""What the agent reports from inside its systemd service, beside node_exporter outside of one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

import vmprovision
from tests.conftest import require
from tests.proof.booting import booted
from vmprovision.appliance.session import Drive, launch
from vmprovision.progress import Control
from vmprovision.proof.machine import wait_for_http

from .test_machine import BOOT_SECONDS, overlay, recipe_image

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

PROGRAM = "prometheus-node-exporter"  # of the Debian package with the same name
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
EXPORTER = f"""\
[Service]
ExecStart=/opt/{PROGRAM} --web.listen-address=127.0.0.1:9100
[Install]
WantedBy=multi-user.target
"""
# Renames the host after the agent has started, as a DHCP client may.
PRINTING = """\
[Unit]
After=guest-agent.service exporter.service
[Service]
ExecStart=/usr/bin/python3 /opt/print.py
StandardOutput=file:/dev/ttyS0
[Install]
WantedBy=multi-user.target
"""
# The guest has the smallest Python of Debian, without http.
PRINTER = """\
import socket, time
socket.sethostname("later-name")
while True:
    try:
        server = socket.create_connection(("127.0.0.1", 9100), timeout=120)
        break
    except OSError:
        time.sleep(0.5)
server.sendall(b"GET /metrics HTTP/1.0\\r\\nHost: guest\\r\\n\\r\\n")
for line in server.makefile(encoding="utf-8"):
    if line.startswith(("node_filesystem_size_bytes", "node_uname_info")):
        print(line.rstrip())
print("all-was-printed", flush=True)
"""
SIZE = re.compile(
    r'node_filesystem_size_bytes\{device="([^"]*)",fstype="([^"]*)",mountpoint="([^"]*)"\} (\S+)'
)


def test_the_service_sees_the_guests_file_systems_and_host_name(tmp_path: Path) -> None:
    """A /home of its own and every other disk as node_exporter sees them, and the new host name."""
    exporter = shutil.which(PROGRAM)
    require(exporter, f"{PROGRAM} is not installed")
    disk = overlay(recipe_image("debian-12-systemd"), tmp_path / "disk.qcow2")
    home = tmp_path / "home.raw"
    program = shutil.which("mke2fs", path=PATH)
    require(program, "mke2fs is not installed")
    subprocess.run([str(program), "-q", "-t", "ext4", str(home), "48M"], check=True)
    with launch([Drive(path=disk, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda1", "/")
        appliance.call("upload", exporter, f"/opt/{PROGRAM}")
        appliance.call("chmod", 0o755, f"/opt/{PROGRAM}")
        appliance.call("write", "/opt/print.py", PRINTER.encode())
        wants = "/etc/systemd/system/multi-user.target.wants"
        appliance.call("mkdir_p", wants)
        for name, unit in (("exporter", EXPORTER), ("printing", PRINTING)):
            appliance.call("write", f"/etc/systemd/system/{name}.service", unit.encode())
            appliance.call("ln_s", f"/etc/systemd/system/{name}.service", f"{wants}/{name}.service")
        appliance.call("write_append", "/etc/fstab", b"/dev/vdb /home ext4 defaults 0 2\n")
        appliance.call("umount_all")
    source = vmprovision.ImageOptions(format="qcow2", allow_backing=True)
    assert vmprovision.inject(disk, source=source).changed
    console, metrics, information = boot_and_ask(disk, home, tmp_path / "console.log")

    exported = {
        mount: (device, kind, int(float(size)) // 1024)
        for device, kind, mount, size in SIZE.findall(console)
        if device.startswith("/dev/")
    }
    assert exported["/home"][:2] == ("/dev/vdb", "ext4")
    reported = {
        each["mountpoint"]: (each["device"], each["type"], each["total_kb"])
        for each in metrics["file_systems"]
        if each["device"].startswith("/dev/")
    }
    assert reported == exported
    (uname,) = re.findall(r'node_uname_info\{.*nodename="([^"]*)"', console)
    assert information["hostname"] == uname == "later-name"


def boot_and_ask(disk: Path, home: Path, log: Path) -> tuple[str, Any, Any]:
    """Return the console's text, and the agent's /metrics and /info after all was printed."""
    deadline = time.monotonic() + BOOT_SECONDS
    with booted(
        disk, console_log=log, firmware=["-drive", f"file={home},format=raw,if=virtio"]
    ) as (machine, _):
        wait_for_http(f"{machine.agent_url}/health", deadline, machine)
        while b"all-was-printed" not in log.read_bytes():
            machine.check()
            assert time.monotonic() < deadline, "node_exporter did not answer"
            time.sleep(0.5)
        metrics = wait_for_http(f"{machine.agent_url}/metrics", deadline, machine)
        information = wait_for_http(f"{machine.agent_url}/info", deadline, machine)
    return log.read_text("utf-8", "replace"), metrics, information
