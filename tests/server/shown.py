"""Rows that the pages show: a VM in each state, with samples, events and a console."""

from __future__ import annotations

import math
import time
import uuid
from typing import TYPE_CHECKING, Any

from sqlalchemy import insert

from tests.server.conftest import TEMPLATE_ID, insert_template
from vmprovision.server.phases import PHASES
from vmprovision.server.tables import events, samples, vms

if TYPE_CHECKING:
    from vmprovision.server.services import Services
    from vmprovision.server.store import Store

SEEN = {
    "requested": (0.0, "the request was recorded"),
    "disk": (0.2, "a qcow2 overlay of 0.2 MB"),
    "injected": (1.7, "the agent is in the guest, enabled for systemd"),
    "defined": (1.9, "libvirt knows the domain"),
    "started": (2.4, "libvirt says that the domain runs, by TCG"),
    "reporting": (3.4, "waiting for the agent's report"),
    "ready": (48.9, "/health answers at 192.168.122.71: healthy, agent 1.0"),
}
CONSOLE = """\
[    0.000000] Linux version 6.1.0-31-amd64
[    2.117930] EXT4-fs (vda1): mounted filesystem with ordered data mode
[  OK  ] Reached target network.target - Network.
[  OK  ] Started guest-agent.service - Guest agent.
\x1b[1;32mDebian GNU/Linux 12\x1b[0m guest ttyS0
"""


def insert_vm(store: Store, name: str, phase: str = "ready", **values: object) -> str:
    """Write the row of a VM that has come to a phase; return its id."""
    vm_id, now = str(uuid.uuid4()), time.time()
    begun = now - 3 * 3600
    reached = PHASES[: PHASES.index(phase) + 1] if phase in PHASES else PHASES[:-1]
    evidence: dict[str, Any] = {
        word: {"at": begun + SEEN[word][0], "detail": SEEN[word][1]} for word in reached
    }
    is_running = phase in ("started", "reporting", "ready")
    row = {
        "id": vm_id,
        "name": name,
        "template_id": TEMPLATE_ID,
        "vcpu": 1,
        "mem_mib": 512,
        "tags": [],
        "host": "qemu:///system",
        "phase": phase,
        "phase_at": begun + 49,
        "wanted": "running",
        "domain_state": "running" if is_running else "absent",
        "evidence": evidence,
        "token_hash": "0" * 64,
        "due_at": 1e12,
        "created_at": begun,
        "updated_at": begun,
        **values,
    }
    with store.write() as connection:
        connection.execute(insert(vms).values(row))
        for word, seen in evidence.items():
            event = {"vm_id": vm_id, "kind": word, "at": seen["at"], "message": seen["detail"]}
            connection.execute(insert(events).values(event))
    return vm_id


def insert_samples(store: Store, vm_id: str, *, level: float, seconds: float = 3600.0) -> None:
    """Write what an agent has measured, every ten seconds until now."""
    now = time.time()
    rows = []
    for number in range(int(seconds / 10)):
        swing = math.sin(number / 23 + level) * 0.6 + math.sin(number / 5) * 0.25
        cpu = max(0.5, level * (1 + swing))
        share = min(95.0, 30 + level * 0.6 + 4 * math.sin(number / 40))
        rows.append(
            {
                "vm_id": vm_id,
                "at": now - seconds + number * 10,
                "cpu_usage_percent": min(cpu, 100.0),
                "memory_usage_percent": share,
                "memory_used_kb": int(share * 5000),
                "memory_total_kb": 500_000,
                "load_average": cpu / 60,
                "process_count": 31,
                "uptime_seconds": 10_800,
            }
        )
    with store.write() as connection:
        connection.execute(insert(samples), rows)


def insert_machines(services: Services) -> dict[str, str]:
    """Write a VM in each state; return their ids by their names."""
    store = services.store
    insert_template(
        store,
        id=str(uuid.uuid4()),
        name="windows",
        state="failed",
        guest={},
        has_agent=False,
        rootfs_path="/images/windows.qcow2",
        error={
            "detail": "windows.qcow2: the guest is Windows; the agent runs in Linux guests",
            "hint": "register an image of a Linux guest",
            "kind": "UnsupportedGuestError",
            "exit_code": 34,
        },
    )
    silent = {
        "detail": "the guest is silent: its kernel panicked",
        "hint": "read the console's last lines; start the VM again to wait for it once more",
        "kind": "ProofError",
        "exit_code": 52,
    }
    at = time.time()
    ready: dict[str, Any] = {
        "guest_ip": "192.168.122.71",
        "reported_at": at - 20,
        "answered_at": at - 4,
    }
    found = {
        "web-1": insert_vm(store, "web-1", tags=["web", "production"], **ready),
        "db-1": insert_vm(store, "db-1", mem_mib=2048, tags=["db"], **ready),
        "build-7": insert_vm(store, "build-7", "injected"),
        "cache": insert_vm(store, "cache", "defined", wanted="stopped", domain_state="off"),
        "broken": insert_vm(store, "broken", "silent", error=silent, domain_state="crashed"),
        "batch": insert_vm(store, "batch", wanted="paused", domain_state="paused", **ready),
    }
    insert_samples(store, found["web-1"], level=22)
    insert_samples(store, found["db-1"], level=55)
    insert_samples(store, found["batch"], level=8)
    folder = services.settings.state / "vms" / found["web-1"]
    folder.mkdir(parents=True)
    (folder / "console.log").write_text(CONSOLE)
    return found
