"""Examine whether this host can do the work; name the command that fixes each fault."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmprovision.appliance.library import guestfs_module, qemu_program
from vmprovision.appliance.snapshot.host import find_host_appliance
from vmprovision.appliance.snapshot.ingredients import UnusableApplianceError
from vmprovision.errors import VmprovisionError
from vmprovision.host.cache import cache_directory
from vmprovision.host.data import data_directory
from vmprovision.host.kernel import KERNEL_VARIABLE, appliance_kernel, host_kernels
from vmprovision.qemu.accelerator import AcceleratorChoice, choose_accelerator
from vmprovision.runtime.build import find_toolchain
from vmprovision.runtime.store import find_runtime, host_architecture, load

APPLIANCE_ROOM = 1 << 30  # libguestfs's unpacked appliance, with a margin
RELEASE = Path("/etc/os-release")
_USAGE = "du -xsh {}/* | sort -h"
VAR_TMP = Path("/var/tmp")  # noqa: S108 -- libguestfs's own default


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One examined property of this host.

    Attributes:
        subject: what was examined.
        ok: whether it suffices for the work.
        detail: what was found, in a sentence.
        fix: the command that fixes it, or an empty string.
        needed: whether nothing works without it; otherwise the work is slower, or only
            building and proving images needs it.
    """

    subject: str
    ok: bool
    detail: str
    fix: str = ""
    needed: bool = True

    def as_json(self) -> dict[str, Any]:
        """Return the finding as ``vmprovision doctor --json`` prints it."""
        return {
            "subject": self.subject,
            "ok": self.ok,
            "detail": self.detail,
            "mend": self.fix,  # scripts know it by this name
            "needed": self.needed,
        }


def examine_host() -> list[Finding]:
    """Examine everything that the work needs of this host, by trying it if possible."""
    return [
        _binding(),
        _kernel(),
        _qemu(),
        _accelerator(),
        _program("qemu-img", packages_command("qemu-utils", "qemu-img")),
        _program("supermin", packages_command("supermin", "supermin")),
        _program("mmdebstrap", packages_command("mmdebstrap", "mmdebstrap"), needed=False),
        _program("extlinux", packages_command("extlinux", "syslinux-extlinux"), needed=False),
        _appliance_space(),
        _cache(),
        _temporary(),
        _data(),
        _runtime(),
        _appliance(),
    ]


def packages_command(debian: str, others: str) -> str:
    """Return the command that installs packages on this host's distribution."""
    command = "apt-get install" if _is_debian() else "dnf install"
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}{command} {debian if _is_debian() else others}"


def _is_debian() -> bool:
    return Path("/etc/debian_version").exists()


def _binding() -> Finding:
    fix = (
        packages_command("python3-guestfs", "python3-libguestfs")
        + " && /usr/bin/python3 -m venv --system-site-packages VENV"
    )
    try:
        version = guestfs_module().GuestFS(python_return_dict=True).version()
    except VmprovisionError as exc:
        return Finding(
            subject="libguestfs binding",
            ok=False,
            detail=f"{exc.message} ({sys.executable})",
            fix=fix,
        )
    numbers = f"{version['major']}.{version['minor']}.{version['release']}"
    return Finding(subject="libguestfs binding", ok=True, detail=f"libguestfs {numbers}")


def _kernel() -> Finding:
    """Examine the host's kernels: libguestfs builds its appliance with a readable one."""
    usable = host_kernels()
    if not usable:
        return Finding(
            subject="kernel",
            ok=False,
            detail="there is no kernel with its modules in /boot and /lib/modules",
            fix=packages_command(
                "linux-image-generic" if _is_ubuntu() else "linux-image-cloud-amd64", "kernel"
            ),
        )
    readable = appliance_kernel()
    if readable is None:
        is_there = usable[-1].exists()
        named = os.environ.get(KERNEL_VARIABLE)
        return Finding(
            subject="kernel",
            ok=False,
            detail=f"{usable[-1]} cannot be read by this user"
            if is_there
            else f"{KERNEL_VARIABLE} names {named}, which does not exist",
            fix=f"sudo chmod 0644 {usable[-1]}" if is_there else f"unset {KERNEL_VARIABLE}",
        )
    return Finding(subject="kernel", ok=True, detail=f"{readable} is readable")


def _is_ubuntu() -> bool:
    try:
        return "ID=ubuntu" in RELEASE.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False


def _qemu() -> Finding:
    try:
        return Finding(subject="QEMU", ok=True, detail=str(qemu_program()))
    except VmprovisionError as exc:
        fix = packages_command("qemu-system-x86", "qemu-kvm")
        return Finding(subject="QEMU", ok=False, detail=exc.message, fix=fix)


def _accelerator() -> Finding:
    try:
        choice = choose_accelerator(qemu_program(), remember=False)
    except VmprovisionError as exc:
        return Finding(subject="KVM", ok=False, detail=exc.message, needed=False)
    works = choice.accelerator == "kvm"
    return Finding(
        subject="KVM",
        ok=works,
        detail=choice.reason if works else f"{choice.reason}; TCG is used, which is slower",
        fix="" if works else _kvm_command(choice),
        needed=False,
    )


def _kvm_command(choice: AcceleratorChoice) -> str:
    """Return the command that fixes KVM or shows its fault; empty if there is none."""
    if choice.is_denied:
        return "sudo adduser $USER kvm, then log in again"
    if choice.verdict in ("fails", "hangs"):
        return (
            "sudo dmesg | grep -i kvm (in a virtual machine, its host must allow nested "
            "virtualization; without it everything works, but slower)"
        )
    return ""


def _program(name: str, fix: str, *, needed: bool = True) -> Finding:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return Finding(
        subject=name,
        ok=found is not None,
        detail=found or "not installed",
        fix="" if found else fix,
        needed=needed,
    )


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _appliance_space() -> Finding:
    """Examine where libguestfs keeps its own appliance, which also depends on TMPDIR."""
    try:
        directory = Path(guestfs_module().GuestFS(python_return_dict=True).get_cachedir())
    except VmprovisionError:
        directory = VAR_TMP
    fix = f"export LIBGUESTFS_CACHEDIR={VAR_TMP}" if directory != VAR_TMP else _USAGE
    return _room(f"space in {directory}", directory, fix.format(directory))


def _temporary() -> Finding:
    """Examine where images are built: a small tmpfs has no room for a guest's packages."""
    directory = Path(tempfile.gettempdir())
    fix = "export TMPDIR=/var/tmp" if directory != VAR_TMP else _USAGE.format(directory)
    return replace(_room(f"temporary files in {directory}", directory, fix), needed=False)


def _cache() -> Finding:
    """Examine the cache: unless only this user can write to it, every appliance is booted."""
    directory = cache_directory()
    subject = f"cache in {directory}"
    existing = _existing_parent(directory)
    status = existing.stat()
    fix = ""
    if existing == directory and status.st_uid != os.geteuid():
        detail, fix = "it belongs to another user", f"sudo chown -R $(id -un) {directory}"
    elif existing == directory and status.st_mode & 0o022:
        detail, fix = "it can be written by others", f"chmod go-w {directory}"
    if fix:
        return Finding(subject=subject, ok=False, detail=detail, fix=fix, needed=False)
    clear = "vmprovision appliance clear" if (directory / "appliance").is_dir() else ""
    finding = _room(subject, existing, clear or _USAGE.format(existing))
    return replace(finding, needed=False)


def _room(subject: str, directory: Path, fix: str) -> Finding:
    """Examine whether a directory is writable and has room for an appliance."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError as exc:
        return Finding(subject=subject, ok=False, detail=str(exc.strerror))
    if not os.access(directory, os.W_OK):
        detail = f"{directory} is not writable by this user"
        return Finding(subject=subject, ok=False, detail=detail, fix=f"chmod u+w {directory}")
    is_enough = free > APPLIANCE_ROOM
    detail = f"{free >> 20} MiB free" + ("" if is_enough else f" of {APPLIANCE_ROOM >> 20} needed")
    return Finding(subject=subject, ok=is_enough, detail=detail, fix="" if is_enough else fix)


def _data() -> Finding:
    try:
        detail = f"{data_directory('templates')}, {data_directory('images')}"
    except VmprovisionError as exc:
        return Finding(subject="templates and recipes", ok=False, detail=exc.message, fix=exc.hint)
    return Finding(subject="templates and recipes", ok=True, detail=detail)


def _appliance() -> Finding:
    """Examine the saved appliance: without one everything works, but slower."""
    try:
        saved = find_host_appliance()
    except UnusableApplianceError as exc:
        detail, fix = exc.message, exc.command
        return Finding(subject="saved appliance", ok=False, detail=detail, fix=fix, needed=False)
    except VmprovisionError as exc:
        return Finding(subject="saved appliance", ok=False, detail=exc.message, needed=False)
    detail = (
        f"{saved.folder}, {saved.size >> 20} MiB"
        if saved
        else "none yet: the first command that opens an image saves one"
    )
    return Finding(subject="saved appliance", ok=True, detail=detail)


def _runtime() -> Finding:
    """Examine the runtime for guests without Python, of this host's architecture only."""
    architecture = host_architecture()
    try:
        runtime = find_runtime(architecture)
        load(runtime)
    except VmprovisionError as exc:
        return Finding(
            subject="runtime",
            ok=False,
            detail=exc.message,
            fix=_runtime_command(architecture),
            needed=False,
        )
    detail = f"MicroPython {runtime.micropython} for {architecture}"
    return Finding(subject="runtime", ok=True, detail=detail)


def _runtime_command(architecture: str) -> str:
    """Return the command that builds the runtime, and installs the compiler if it is missing."""
    build = f"vmprovision runtime build {architecture}"
    try:
        find_toolchain(architecture)
    except VmprovisionError:
        packages = "gcc libc6-dev make musl-tools xz-utils", "gcc make musl-gcc xz"
        return f"{packages_command(*packages)} && {build}"
    return build
