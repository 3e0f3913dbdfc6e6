"""Describe a VM to libvirt: the XML of its domain, by libvirt's ``formatdomain``."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmprovision.errors import UnsupportedGuestError

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.qemu.options import Accelerator

NAMESPACE = "urn:vmprovision:domain"
PREFIX = "vmprovision"
WITH_A_DISPLAY = ("x86_64", "i386")  # a PC's GRUB waits for ever without a graphics card's BIOS
BOARDS = {"x86_64": ("x86_64", "q35"), "i386": ("x86_64", "q35"), "aarch64": ("aarch64", "virt")}

ET.register_namespace(PREFIX, NAMESPACE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The facts about a VM that libvirt needs.

    Attributes:
        id: the name and the UUID of the domain.
        title: the VM's name for people.
        installation: the name of the VM's store.
        arch: the guest's architecture, as uname(1) names it.
        disk: the VM's own qcow2 image.
        base: its backing image.
        sectors: the size of the disk's sectors.
        owner: the user and group that QEMU runs as, for which the files were prepared; None
            lets libvirt change the files' owners.
    """

    id: str
    title: str
    installation: str
    arch: str
    vcpu: int
    mem_mib: int
    disk: Path
    base: Path
    base_format: str
    sectors: int
    console: Path
    network: str
    accelerator: Accelerator
    owner: tuple[int, int] | None
    firmware: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    command_line: str = ""


def domain_xml(machine: Machine) -> str:
    """Return the domain's description.

    Raises:
        UnsupportedGuestError: no board is known for the guest's architecture.
    """
    if machine.arch not in BOARDS:
        raise UnsupportedGuestError(f"this version starts no guests for {machine.arch}")
    domain = ET.Element("domain", type="kvm" if machine.accelerator == "kvm" else "qemu")
    _text(domain, "name", machine.id)
    _text(domain, "uuid", machine.id)
    _text(domain, "title", machine.title)
    metadata = ET.SubElement(domain, "metadata")
    ET.SubElement(metadata, f"{{{NAMESPACE}}}vm", installation=machine.installation)
    _text(domain, "memory", str(machine.mem_mib)).set("unit", "MiB")
    _text(domain, "vcpu", str(machine.vcpu))
    _add_boot(domain, machine)
    ET.SubElement(ET.SubElement(domain, "features"), "acpi")
    is_kvm = machine.accelerator == "kvm"
    ET.SubElement(domain, "cpu", mode="host-passthrough" if is_kvm else "maximum")
    _text(domain, "on_poweroff", "destroy")
    _text(domain, "on_reboot", "restart")
    _text(domain, "on_crash", "destroy")
    _add_devices(ET.SubElement(domain, "devices"), machine)
    if machine.owner is not None:
        label = ET.SubElement(domain, "seclabel", type="static", model="dac", relabel="no")
        _text(label, "label", "+{}:+{}".format(*machine.owner))
    return ET.tostring(domain, encoding="unicode")


def _add_boot(domain: ET.Element, machine: Machine) -> None:
    arch, board = BOARDS[machine.arch]
    system = ET.SubElement(domain, "os")
    _text(system, "type", "hvm").attrib.update(arch=arch, machine=board)
    if machine.firmware is not None:
        _text(system, "loader", machine.firmware).attrib.update(readonly="yes", type="pflash")
    if machine.kernel is None:
        ET.SubElement(system, "boot", dev="hd")
        return
    _text(system, "kernel", machine.kernel)
    if machine.initrd is not None:
        _text(system, "initrd", machine.initrd)
    # a guest that panics resets its machine at once, and libvirt reports it
    _text(system, "cmdline", machine.command_line)


def _add_devices(devices: ET.Element, machine: Machine) -> None:
    disk = ET.SubElement(devices, "disk", type="file", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type="qcow2", discard="unmap")
    ET.SubElement(disk, "source", file=str(machine.disk))
    backing = ET.SubElement(disk, "backingStore", type="file")
    ET.SubElement(backing, "format", type=machine.base_format)
    ET.SubElement(backing, "source", file=str(machine.base))
    ET.SubElement(backing, "backingStore")
    if machine.sectors != 512:  # noqa: PLR2004 -- what every disk has otherwise
        size = str(machine.sectors)
        ET.SubElement(disk, "blockio", logical_block_size=size, physical_block_size=size)
    ET.SubElement(disk, "target", dev="vda", bus="virtio")
    card = ET.SubElement(devices, "interface", type="network")
    ET.SubElement(card, "source", network=machine.network)
    ET.SubElement(card, "model", type="virtio")
    serial = ET.SubElement(devices, "serial", type="file")
    ET.SubElement(serial, "source", path=str(machine.console), append="on")
    by_bios = machine.kernel is None and machine.firmware is None
    if by_bios and machine.arch in WITH_A_DISPLAY:
        ET.SubElement(ET.SubElement(devices, "video"), "model", type="vga")
    rng = ET.SubElement(devices, "rng", model="virtio")
    _text(rng, "backend", "/dev/urandom").set("model", "random")
    ET.SubElement(devices, "memballoon", model="none")


def _text(parent: ET.Element, name: str, text: str) -> ET.Element:
    element = ET.SubElement(parent, name)
    element.text = text
    return element
