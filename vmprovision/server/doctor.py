"""Examine whether this host can run the server; name the command that fixes each fault."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vmprovision.doctor import Finding, packages_command
from vmprovision.errors import HypervisorError
from vmprovision.server.hypervisor import Hypervisor

URI = "qemu:///system"
NETWORK = "default"
SYSTEMD = Path("/run/systemd/system")


def examine_server() -> list[Finding]:
    """Examine the server's further requirements, by trying them if possible."""
    return [
        _program("libvirtd", packages_command("libvirt-daemon-system", "libvirt-daemon-kvm")),
        _program("dnsmasq", packages_command("dnsmasq-base", "dnsmasq")),
        *_libvirt(),
    ]


def _program(name: str, fix: str) -> Finding:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return Finding(
        subject=name,
        ok=found is not None,
        detail=found or "not installed",
        fix="" if found else fix,
    )


def _libvirt() -> list[Finding]:
    """Examine the binding, then the daemon, then the network; each needs the previous one."""
    try:
        host = Hypervisor(URI, "")
    except HypervisorError as exc:
        fix = packages_command("python3-libvirt", "python3-libvirt")
        return [Finding(subject="libvirt binding", ok=False, detail=exc.message, fix=fix)]
    found = [Finding(subject="libvirt binding", ok=True, detail="installed")]
    try:
        free = host.free_memory()
    except HypervisorError as exc:
        fix = (
            "sudo systemctl start libvirtd"
            if SYSTEMD.is_dir()
            else "mkdir -p /run/libvirt && virtlogd -d && libvirtd -d"
        )
        return [*found, Finding(subject=URI, ok=False, detail=exc.message, fix=fix)]
    found.append(Finding(subject=URI, ok=True, detail=f"answers; {free >> 20} MiB free"))
    try:
        network = host.network(NETWORK)
        is_active = host.is_active(NETWORK)
    except HypervisorError as exc:
        fix = packages_command("libvirt-daemon-config-network", "libvirt-daemon-config-network")
        finding = Finding(subject=f"network {NETWORK}", ok=False, detail=exc.message, fix=fix)
        return [*found, finding]
    detail = f"{network.subnet}" if is_active else "it is not active"
    fix = "" if is_active else f"virsh -c {URI} net-start {NETWORK}"
    return [*found, Finding(subject=f"network {NETWORK}", ok=is_active, detail=detail, fix=fix)]
