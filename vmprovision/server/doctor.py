"""Examine whether this host can run the server; name the command that fixes each fault."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
from pathlib import Path

from vmprovision.doctor import Finding, packages_command
from vmprovision.errors import CommandError, HypervisorError
from vmprovision.host.command import find_program
from vmprovision.server.hypervisor import Hypervisor

URI = "qemu:///system"
NETWORK = "default"
SYSTEMD = Path("/run/systemd/system")
KVM = Path("/dev/kvm")
KVM_GET_API_VERSION = 0xAE00  # the ioctl of linux/kvm.h that every KVM answers
READ_AND_WRITE = 0o6


def examine_server() -> list[Finding]:
    """Examine the server's further requirements, by trying them if possible."""
    return [
        _program("libvirtd", packages_command("libvirt-daemon-system", "libvirt-daemon-kvm")),
        _program("dnsmasq", packages_command("dnsmasq-base", "dnsmasq")),
        *_libvirt(),
    ]


def _program(name: str, fix: str) -> Finding:
    try:
        found = str(find_program(name))
    except CommandError:
        found = ""
    return Finding(
        subject=name, ok=bool(found), detail=found or "not installed", fix="" if found else fix
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
        free, owner = host.free_memory(), host.qemu_owner()
    except HypervisorError as exc:
        fix = (
            "sudo systemctl start libvirtd"
            if SYSTEMD.is_dir()
            else "mkdir -p /run/libvirt && virtlogd -d && libvirtd -d"
        )
        return [*found, Finding(subject=URI, ok=False, detail=exc.message, fix=fix)]
    found.append(Finding(subject=URI, ok=True, detail=f"answers; {free >> 20} MiB free"))
    found += _kvm(owner)
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


def _kvm(owner: tuple[int, int] | None) -> list[Finding]:
    """Examine whether libvirt's two ways to look at KVM agree.

    To learn what QEMU can do, libvirt starts it with a capability that opens every device.
    Before it uses what it learned, it checks whether QEMU's user may open ``/dev/kvm``. If
    the answers differ, it starts QEMU again, for each device of a domain.
    """
    if owner is None or not KVM.exists():
        return []
    try:
        works = _has_kvm()
    except PermissionError:
        return []  # only root knows
    may_open = _may_open(KVM.stat(), *owner)
    agree = works == may_open
    slow = "so libvirt examines QEMU many times for each VM, which takes seconds"
    detail, fix = "libvirt and QEMU's user see the same", ""
    if not agree and works:
        detail = f"QEMU's user may not open it, {slow}"
        fix = f"sudo chgrp kvm {KVM} && sudo chmod g+rw {KVM}"
    elif not agree:
        detail = f"it does not work, but QEMU's user may open it, {slow}"
        fix = f"sudo chmod 600 {KVM}"
    return [Finding(subject=f"{KVM} of libvirt", ok=agree, detail=detail, fix=fix, needed=False)]


def _has_kvm() -> bool:
    """Return whether there is a KVM behind its device, which says nothing about its faults.

    Raises:
        PermissionError: this user may not open the device.
    """
    try:
        device = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EPERM):
            raise
        return False
    try:
        return fcntl.ioctl(device, KVM_GET_API_VERSION) > 0
    except OSError:
        return False
    finally:
        os.close(device)


def _may_open(device: os.stat_result, user: int, group: int) -> bool:
    """Return whether a user may read and write a device, by its mode."""
    groups = [group]
    with contextlib.suppress(KeyError):
        groups = os.getgrouplist(pwd.getpwuid(user).pw_name, group)
    shift = 6 if user == device.st_uid else 3 if device.st_gid in groups else 0
    return user == 0 or device.st_mode >> shift & READ_AND_WRITE == READ_AND_WRITE
