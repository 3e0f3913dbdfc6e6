"""Can this host do the work?  Each finding comes with the command that mends it."""

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
from vmprovision.errors import VmprovisionError
from vmprovision.host.cache import cache_directory
from vmprovision.host.data import data_directory
from vmprovision.host.kernel import KERNEL_VARIABLE, appliance_kernel, host_kernels
from vmprovision.qemu.accelerator import AcceleratorChoice, choose_accelerator
from vmprovision.runtime.build import find_toolchain
from vmprovision.runtime.store import find_runtime, host_architecture, load

APPLIANCE_ROOM = 1 << 30  # libguestfs's appliance, unpacked, with its margin
RELEASE = Path("/etc/os-release")
_USAGE = "du -xsh {}/* | sort -h"
VAR_TMP = Path("/var/tmp")  # noqa: S108 -- libguestfs's own default


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what was looked at.
        ok: whether it is as the work needs it.
        detail: what was seen, in a sentence.
        mend: the command that mends it, or an empty string.
        needed: whether nothing works without it; else it is slower, or only
            building and proving images lack it.
    """

    subject: str
    ok: bool
    detail: str
    mend: str = ""
    needed: bool = True

    def as_json(self) -> dict[str, Any]:
        """The finding as ``vmprovision doctor --json`` prints it."""
        return {name: getattr(self, name) for name in self.__slots__}


def examine_host() -> list[Finding]:
    """Everything that the work needs of this host, looked at or tried now."""
    return [
        _binding(),
        _kernel(),
        _qemu(),
        _accelerator(),
        _program("qemu-img", _packages("qemu-utils", "qemu-img")),
        _program("supermin", _packages("supermin", "supermin")),
        _program("mmdebstrap", _packages("mmdebstrap", "mmdebstrap"), needed=False),
        _program("extlinux", _packages("extlinux", "syslinux-extlinux"), needed=False),
        _appliance_space(),
        _cache(),
        _temporary(),
        _data(),
        _runtime(),
        _appliance(),
    ]


def _packages(debian: str, others: str) -> str:
    """The command that installs a package on this host's distribution."""
    command = "apt-get install" if _is_debian() else "dnf install"
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}{command} {debian if _is_debian() else others}"


def _is_debian() -> bool:
    return Path("/etc/debian_version").exists()


def _binding() -> Finding:
    mend = (
        _packages("python3-guestfs", "python3-libguestfs")
        + " && /usr/bin/python3 -m venv --system-site-packages VENV"
    )
    try:
        version = guestfs_module().GuestFS(python_return_dict=True).version()
    except VmprovisionError as exc:
        return Finding(
            subject="libguestfs binding",
            ok=False,
            detail=f"{exc.message} ({sys.executable})",
            mend=mend,
        )
    numbers = f"{version['major']}.{version['minor']}.{version['release']}"
    return Finding(subject="libguestfs binding", ok=True, detail=f"libguestfs {numbers}")


def _kernel() -> Finding:
    """Libguestfs's appliance is made with a kernel of the host, which must be readable."""
    usable = host_kernels()
    if not usable:
        return Finding(
            subject="kernel",
            ok=False,
            detail="there is no kernel with its modules in /boot and /lib/modules",
            mend=_packages(
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
            else f"{KERNEL_VARIABLE} names {named}, which is not there",
            mend=f"sudo chmod 0644 {usable[-1]}" if is_there else f"unset {KERNEL_VARIABLE}",
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
        mend = _packages("qemu-system-x86", "qemu-kvm")
        return Finding(subject="QEMU", ok=False, detail=exc.message, mend=mend)


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
        mend="" if works else _kvm_command(choice),
        needed=False,
    )


def _kvm_command(choice: AcceleratorChoice) -> str:
    """The command that mends KVM, or says what is wrong with it; where there is any to be had."""
    if "not accessible" in choice.reason:
        return "sudo adduser $USER kvm, then log in again"
    if choice.verdict in ("fails", "hangs"):
        return (
            "sudo dmesg | grep -i kvm (in a virtual machine, its host must allow nested "
            "virtualization; without that nothing is lost but time)"
        )
    return ""


def _program(name: str, mend: str, *, needed: bool = True) -> Finding:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return Finding(
        subject=name,
        ok=found is not None,
        detail=found or "not installed",
        mend="" if found else mend,
        needed=needed,
    )


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _appliance_space() -> Finding:
    """Where libguestfs keeps its own appliance: it goes by TMPDIR, too."""
    try:
        directory = Path(guestfs_module().GuestFS(python_return_dict=True).get_cachedir())
    except VmprovisionError:
        directory = VAR_TMP
    mend = f"export LIBGUESTFS_CACHEDIR={VAR_TMP}" if directory != VAR_TMP else _USAGE
    return _room(f"space in {directory}", directory, mend.format(directory))


def _temporary() -> Finding:
    """Only images are built there; a small tmpfs is too small for a guest's packages."""
    directory = Path(tempfile.gettempdir())
    mend = "export TMPDIR=/var/tmp" if directory != VAR_TMP else _USAGE.format(directory)
    return replace(_room(f"temporary files in {directory}", directory, mend), needed=False)


def _cache() -> Finding:
    """Without a cache that is this user's alone nothing is kept, and each appliance is booted."""
    directory = cache_directory()
    subject = f"cache in {directory}"
    existing = _existing_parent(directory)
    status = existing.stat()
    mend = ""
    if existing == directory and status.st_uid != os.geteuid():
        detail, mend = "it belongs to somebody else", f"sudo chown -R $(id -un) {directory}"
    elif existing == directory and status.st_mode & 0o022:
        detail, mend = "it can be written by others", f"chmod go-w {directory}"
    if mend:
        return Finding(subject=subject, ok=False, detail=detail, mend=mend, needed=False)
    clear = "vmprovision appliance clear" if (directory / "appliance").is_dir() else ""
    finding = _room(subject, existing, clear or _USAGE.format(existing))
    return replace(finding, needed=False)


def _room(subject: str, directory: Path, mend: str) -> Finding:
    """Whether a directory can be written, and has room for an appliance."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError as exc:
        return Finding(subject=subject, ok=False, detail=str(exc.strerror))
    if not os.access(directory, os.W_OK):
        detail = f"{directory} is not writable by this user"
        return Finding(subject=subject, ok=False, detail=detail, mend=f"chmod u+w {directory}")
    is_enough = free > APPLIANCE_ROOM
    detail = f"{free >> 20} MiB free" + ("" if is_enough else f" of {APPLIANCE_ROOM >> 20} needed")
    return Finding(subject=subject, ok=is_enough, detail=detail, mend="" if is_enough else mend)


def _data() -> Finding:
    try:
        detail = f"{data_directory('templates')}, {data_directory('images')}"
    except VmprovisionError as exc:
        return Finding(subject="templates and recipes", ok=False, detail=exc.message, mend=exc.hint)
    return Finding(subject="templates and recipes", ok=True, detail=detail)


def _appliance() -> Finding:
    """Without a saved one everything works, and takes longer."""
    try:
        saved = find_host_appliance()
    except VmprovisionError as exc:
        return Finding(
            subject="saved appliance",
            ok=False,
            detail=exc.message,
            mend=exc.hint if exc.hint.startswith("`") else "",
            needed=False,
        )
    detail = f"{saved.folder}, {saved.size >> 20} MiB" if saved else "none yet: it is made once"
    return Finding(subject="saved appliance", ok=True, detail=detail)


def _runtime() -> Finding:
    """Guests without Python need one; this host's architecture stands for all."""
    architecture = host_architecture()
    try:
        runtime = find_runtime(architecture)
        load(runtime)
    except VmprovisionError as exc:
        return Finding(
            subject="runtime",
            ok=False,
            detail=exc.message,
            mend=_runtime_command(architecture),
            needed=False,
        )
    detail = f"MicroPython {runtime.micropython} for {architecture}"
    return Finding(subject="runtime", ok=True, detail=detail)


def _runtime_command(architecture: str) -> str:
    """The command that builds it, with the compiler where that is missing."""
    build = f"vmprovision runtime build {architecture}"
    try:
        find_toolchain(architecture)
    except VmprovisionError:
        packages = "gcc libc6-dev make musl-tools xz-utils", "gcc make musl-gcc xz"
        return f"{_packages(*packages)} && {build}"
    return build
