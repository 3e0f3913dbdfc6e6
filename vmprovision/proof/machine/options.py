"""QEMU's command line for one machine, as in qemu-system(1)."""

from __future__ import annotations

import ipaddress
import json
import shlex
import shutil
import sys
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmprovision.errors import ProofError
from vmprovision.proof.machine import relay
from vmprovision.qemu.lifeline import ISOLATED_PYTHON
from vmprovision.qemu.options import Accelerator, accelerator_options

MANAGER_URL = "http://10.0.2.100:8081"  # in the guest's network; any address inside 10.0.2.0/24


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """QEMU's program and board for an architecture.

    Attributes:
        programs: the names of QEMU's program, the preferred one first.
        package: the Debian package with the program.
        machine: the board, with its properties.
        natively: the host architectures, as uname(1) names them, that may run it with KVM.
        console: the board's serial port, as Linux names it.
        processor: TCG's processor, which meets the requirements of current distributions.
        bus: the bus of virtio devices: "pci", or "ccw" on IBM Z.
    """

    programs: tuple[str, ...]
    package: str
    machine: str
    natively: tuple[str, ...] = ()
    console: str = "ttyS0"
    processor: str = "max"
    bus: str = "pci"


HARDWARE = {
    "x86_64": Hardware(
        programs=("qemu-system-x86_64", "/usr/libexec/qemu-kvm"),
        package="qemu-system-x86",
        machine="q35",
        natively=("x86_64",),
    ),
    "i386": Hardware(
        programs=("qemu-system-x86_64", "qemu-system-i386"),
        package="qemu-system-x86",
        machine="pc",
        natively=("x86_64", "i686"),
    ),
    "aarch64": Hardware(
        programs=("qemu-system-aarch64", "/usr/libexec/qemu-kvm"),
        package="qemu-system-arm",
        machine="virt",
        natively=("aarch64",),
        console="ttyAMA0",
        # the architected algorithm for signing pointers takes most of an emulated processor's time
        processor="max,pauth-impdef=on",
    ),
    "armv7l": Hardware(
        programs=("qemu-system-arm", "qemu-system-aarch64"),
        package="qemu-system-arm",
        # a kernel without LPAE finds no PCI bus above 4 GiB
        machine="virt,highmem=off",
        console="ttyAMA0",
        processor="cortex-a15",
    ),
    "riscv64": Hardware(
        programs=("qemu-system-riscv64",),
        package="qemu-system-misc",
        machine="virt",
        processor="rv64",
    ),
    "ppc64le": Hardware(
        programs=("qemu-system-ppc64",),
        package="qemu-system-ppc",
        machine="pseries",
        console="hvc0",
        processor="power9",
    ),
    "s390x": Hardware(
        programs=("qemu-system-s390x",),
        package="qemu-system-misc (qemu-system-s390x since Debian 13)",
        machine="s390-ccw-virtio",
        natively=("s390x",),
        console="ttysclp0",
        # QEMU 7.2 gets the vector checksum wrong (10.0 does not), and Linux 6.12 then
        # drops every TCP segment; so a guest compiled for z13 or newer does not start here
        processor="max,vx=off,vxeh=off,vxeh2=off",
        bus="ccw",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BootSource:
    """The source of the guest's kernel: the disk's own boot loader, or files of the host.

    Attributes:
        firmware: UEFI code as a flash image; if None, the board's own (a PC's BIOS).
        kernel: the kernel to load; if None, the disk's boot loader starts.
        initrd: the kernel's initial RAM disk.
        command_line: the kernel's, without ``panic=-1``, which is added.
        display: whether a PC has a graphics card. GRUB asks the card's own BIOS for a mode, and
            waits for ever if there is none. For others a console on it costs time.
    """

    firmware: Path | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    command_line: str = ""
    display: bool = False


def find_qemu(arch: str, hardware: Hardware) -> Path:
    """Return the QEMU for an architecture on this host.

    Raises:
        ProofError: it is not installed.
    """
    for program in hardware.programs:
        found = shutil.which(program)
        if found:
            return Path(found)
    raise ProofError(
        f"{hardware.programs[0]} is not installed",
        hint=f"install QEMU for {arch} guests: on Debian the package {hardware.package}",
    )


def board_options(hardware: Hardware, accelerator: Accelerator, memory_mb: int) -> list[str]:
    """Return the board, its processor, memory and source of random numbers."""
    return [
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", hardware.machine),
        *accelerator_options(accelerator, processor=hardware.processor),
        *("-m", str(memory_mb)),
        *("-object", "rng-builtin,id=rng", "-device", f"virtio-rng-{hardware.bus},rng=rng"),
    ]


def boot_options(source: BootSource) -> list[str]:
    """Return the options for what the machine starts first."""
    options: list[str] = []
    if source.display:
        options += ["-device", "VGA"]
    if source.firmware is not None:
        file = {"driver": "file", "filename": str(source.firmware.absolute())}
        code = {"driver": "raw", "file": file}
        options += ["-blockdev", _node("firmware", code, readonly=True)]
        options += ["-machine", "pflash0=firmware"]
    if source.kernel is not None:
        options += ["-kernel", str(source.kernel)]
        options += ["-append", f"{source.command_line} panic=-1".strip()]
        if source.initrd is not None:
            options += ["-initrd", str(source.initrd)]
    return options


def disk_options(hardware: Hardware, disk: dict[str, Any], sectors: int) -> list[str]:
    """Return the guest's only disk, given its block node and the size of its sectors."""
    size = f"logical_block_size={sectors},physical_block_size={sectors}"
    return [
        *("-blockdev", _node("root", disk, readonly=False)),
        *("-device", f"virtio-blk-{hardware.bus},drive=root,bootindex=1,{size}"),
    ]


def _node(name: str, disk: dict[str, Any], *, readonly: bool) -> str:
    """Return a block node as JSON, which needs no quoting of paths; nothing is flushed to disk."""
    cache = {"direct": False, "no-flush": True}
    return json.dumps(
        {
            **disk,
            "node-name": name,
            "read-only": readonly,
            "cache": cache,
            "file": {**disk["file"], "cache": cache},
        }
    )


def network_options(hardware: Hardware, agent_port: int, manager: str) -> list[str]:
    """Return the options of the guest's network card, and of the two ways out of its network."""
    host, _, port = manager.rpartition(":")
    host = host.strip("[]")
    if not ipaddress.ip_address(host).is_loopback:
        raise ProofError(f"the manager {manager} is not on loopback")
    relay_words = [sys.executable, *ISOLATED_PYTHON, str(Path(relay.__file__)), host, port]
    inside = urllib.parse.urlsplit(MANAGER_URL).netloc
    # the command is split as a shell would (g_shell_parse_argv), the option at commas
    command = shlex.join(relay_words).replace(",", ",,")
    no_rom = ",romfile=" if hardware.bus == "pci" else ""
    ways = f"hostfwd=tcp:127.0.0.1:0-:{agent_port},guestfwd=tcp:{inside}-cmd:{command}"
    return [
        *("-netdev", f"user,id=net,restrict=on,{ways}"),
        *("-device", f"virtio-net-{hardware.bus},netdev=net{no_rom}"),
    ]
