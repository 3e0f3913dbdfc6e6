"""The steps that create, watch and delete a VM. Each one checks first, then acts.

A server may be killed anywhere in a step, and another one repeats the step. So a step
repeats nothing that is done already, and every name in it is the VM's id.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision.errors import HypervisorError, PlanError, about_image
from vmprovision.planning.injection import InjectOptions
from vmprovision.reports import ImageOptions
from vmprovision.server.domain import Machine, domain_xml
from vmprovision.server.files import (
    give_to_qemu,
    make_folder,
    make_overlay,
    remove_folder,
    vm_files,
)
from vmprovision.server.injecting import inject_image
from vmprovision.server.phases import next_step
from vmprovision.server.preparing import base_image
from vmprovision.server.queries import count_booting
from vmprovision.server.tools import Outcome, accelerator_of, arrived
from vmprovision.server.watching import watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmprovision.server.hypervisor import Hypervisor
    from vmprovision.server.phases import StepName
    from vmprovision.server.rows import TemplateRow, VmRow
    from vmprovision.server.tools import Tools

TEMPLATE_SECONDS = 1.0
REST_SECONDS = 3600.0
TURN_SECONDS = 2.0
BOOT_SECONDS = 120.0  # a guest that has not answered by then holds up no other


def do_step(tools: Tools, vm: VmRow) -> Outcome:
    """Do the next step of a VM.

    Raises:
        VmprovisionError: the step failed.
    """
    step = next_step(vm)
    if step == "rest":
        return Outcome(due_in=REST_SECONDS)
    if step in _OF_MACHINES:
        return _OF_MACHINES[step](tools, vm)
    return _OF_DISKS[step](tools, vm, tools.template_of(vm))


def give_up(tools: Tools, vm: VmRow) -> dict[str, Any]:
    """Remove the disk of a VM that could not be made; return the columns that say so.

    A VM that has got as far as its own settings keeps its disk, for the next try.
    """
    if vm.phase not in ("requested", "disk"):
        return {}
    remove_folder(vm_files(tools.settings.state, vm.id).folder)
    evidence = {phase: seen for phase, seen in vm.evidence.items() if phase != "disk"}
    return {"phase": "requested", "evidence": evidence, "host": None}


def make_disk(tools: Tools, vm: VmRow, template: TemplateRow) -> Outcome:
    """Choose a host, and create an empty disk on the template's image.

    Raises:
        VmprovisionError: the template is not usable, or the disk cannot be made.
    """
    if template.state == "preparing":
        return Outcome(due_in=TEMPLATE_SECONDS)
    if template.state != "ready" or template.boot is None:
        reason = (template.error or {}).get("detail", "it is being deleted")
        raise PlanError(
            f"the template {template.name} cannot be used: {reason}",
            hint=f"GET /v1/templates/{template.id}",
        )
    host = tools.best_host()
    files = vm_files(tools.settings.state, vm.id)
    with about_image(Path(template.rootfs_path)):
        make_folder(files.folder)
        make_overlay(files.disk, base_image(tools, template), template.boot["format"])
    detail = f"{files.disk.stat().st_size} bytes on the image of template {template.name}"
    return Outcome(changes=arrived(vm, "disk", detail, host=host.uri), kind="disk", message=detail)


def inject_agent(tools: Tools, vm: VmRow, template: TemplateRow) -> Outcome:
    """Write the VM's own settings to its disk; the template's image stays unchanged.

    Raises:
        VmprovisionError: the injection failed; the disk is unchanged.
    """
    if not template.has_agent:
        detail = "no agent: the template's guest cannot be injected, and needs no agent"
        changes = arrived(vm, "injected", detail, token=None)
        return Outcome(changes=changes, kind="injected", message=detail)
    options = InjectOptions(
        vm_id=vm.id, manager_url=_manager_url(tools, tools.host_of(vm.host)), token=vm.token
    )
    source = ImageOptions(format="qcow2", allow_backing=True)
    disk = vm_files(tools.settings.state, vm.id).disk
    report = inject_image(tools, disk, options, source=source)
    allocated = disk.stat().st_blocks * 512
    detail = (
        f"agent {report.agent_version} under {report.guest.init.system}, {report.verified} "
        f"operations verified; the disk has {allocated} bytes"
    )
    changes = arrived(vm, "injected", detail, token=None)
    return Outcome(changes=changes, kind="injected", message=detail)


def _manager_url(tools: Tools, host: Hypervisor) -> str:
    settings = tools.settings
    if settings.manager_url is not None:
        return settings.manager_url
    address = host.network(settings.network).address
    shown = f"[{address}]" if ":" in address else address
    return f"http://{shown}:{settings.report_port}"


def define(tools: Tools, vm: VmRow, template: TemplateRow) -> Outcome:
    """Define the VM's domain.

    Raises:
        HypervisorError: libvirt refuses, or such a domain belongs to another program.
    """
    host, files = tools.host_of(vm.host), vm_files(tools.settings.state, vm.id)
    owner = host.qemu_owner()
    give_to_qemu(files.disk, owner)
    boot = template.boot or {}
    arch = boot.get("arch", "x86_64")
    accelerator = accelerator_of(host, arch)
    machine = Machine(
        id=vm.id,
        title=vm.name,
        installation=tools.store.installation,
        arch=arch,
        vcpu=vm.vcpu,
        mem_mib=vm.mem_mib,
        disk=files.disk,
        base=base_image(tools, template),
        base_format=boot["format"],
        sectors=boot.get("sectors", 512),
        console=files.console,
        network=tools.settings.network,
        accelerator=accelerator,
        owner=owner,
        firmware=boot.get("firmware"),
        kernel=boot.get("kernel"),
        initrd=boot.get("initrd"),
        command_line=boot.get("command_line", ""),
    )
    host.define(vm.id, domain_xml(machine))
    detail = f"libvirt domain {vm.id} on {host.uri}, by {accelerator.upper()}"
    changes = arrived(vm, "defined", detail, domain_state="off")
    return Outcome(changes=changes, kind="defined", message=detail)


def start(tools: Tools, vm: VmRow) -> Outcome:
    """Start the VM's domain, unless it runs.

    Raises:
        HypervisorError: libvirt refuses.
    """
    host = tools.host_of(vm.host)
    if host.state_of(vm.id) in ("off", "crashed"):
        if _must_wait(tools, vm, host):
            return Outcome(due_in=TURN_SECONDS)
        # an old panic says nothing about the boot that begins now
        vm_files(tools.settings.state, vm.id).console.unlink(missing_ok=True)
    host.start(vm.id)
    state = host.state_of(vm.id)
    if state == "absent":
        raise HypervisorError(
            f"the domain {vm.id} was removed from {host.uri} by another program",
            hint="delete the VM",
        )
    detail = f"libvirt says that the domain is {state}"
    changes = arrived(
        vm,
        "started",
        detail,
        domain_state=state,
        guest_ip=None,
        reported_at=None,
        answered_at=None,
        deadline_at=None,
        stop_at=None,
    )
    return Outcome(changes=changes, kind="started", message=detail)


def _must_wait(tools: Tools, vm: VmRow, host: Hypervisor) -> bool:
    """Return whether a host without KVM has enough to do with machines that boot already."""
    booting = count_booting(tools.store, host.uri, time.time() - BOOT_SECONDS)
    if booting < host.processors():
        return False
    boot = tools.template_of(vm).boot or {}
    return accelerator_of(host, boot.get("arch", "x86_64")) != "kvm"


def delete(tools: Tools, vm: VmRow) -> Outcome:
    """Remove the domain, then the files; the row is deleted last.

    Raises:
        HypervisorError: libvirt cannot be reached, or the domain belongs to another program.
        OSError: a file cannot be removed.
    """
    if vm.host is not None:
        tools.host_of(vm.host).remove(vm.id)
    remove_folder(vm_files(tools.settings.state, vm.id).folder)
    return Outcome(is_gone=True, kind="deleted", message="domain and files are gone")


_OF_MACHINES: dict[StepName, Callable[[Tools, VmRow], Outcome]] = {
    "start": start,
    "watch": watch,
    "delete": delete,
}
_OF_DISKS: dict[StepName, Callable[[Tools, VmRow, TemplateRow], Outcome]] = {
    "make_disk": make_disk,
    "inject": inject_agent,
    "define": define,
}
