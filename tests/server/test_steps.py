"""Each step may be done again: a server was killed before it could say what it had done."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.server.libvirt_host import LibvirtHost, libvirt_host
from vmprovision.errors import HypervisorError
from vmprovision.progress import Control
from vmprovision.recipe import build_image
from vmprovision.server.actions.creation import create_vm
from vmprovision.server.actions.templates import create_template
from vmprovision.server.actions.vms import delete_vm, stop_vm
from vmprovision.server.agents import AgentClient
from vmprovision.server.hypervisor import Hypervisor, HypervisorUnreachableError
from vmprovision.server.leases import Lease, claim_building_vm, claim_template, finish
from vmprovision.server.models import CreateVm, TemplateSpec, WriteTemplate
from vmprovision.server.preparing import prepare
from vmprovision.server.queries import find_vm
from vmprovision.server.steps import do_step
from vmprovision.server.tables import templates, vms
from vmprovision.server.tools import Tools

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmprovision.server.rows import VmRow
    from vmprovision.server.services import Services
    from vmprovision.server.store import Store

pytestmark = pytest.mark.appliance

FOREIGN = """\
<domain type='qemu'><name>{name}</name>{uuid}<memory unit='MiB'>32</memory>
<os><type arch='x86_64'>hvm</type></os></domain>
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LibvirtHost]:
    """Return a private libvirt."""
    with libvirt_host(tmp_path_factory.mktemp("libvirt") / "host") as started:
        yield started


@pytest.fixture
def tools(services: Services, host: LibvirtHost) -> Iterator[Tools]:
    """Return what the steps work with, on a private libvirt."""
    agents = AgentClient()
    yield Tools(
        settings=services.settings,
        store=services.store,
        agents=agents,
        hosts={host.uri: Hypervisor(host.uri, services.store.installation)},
        pool=None,
        fleet=None,
        control=Control(),
    )
    agents.close()


def claimed(store: Store) -> VmRow:
    """Claim the one VM that wants work."""
    found = claim_building_vm(store, "owner", 600)
    assert found is not None
    return found


def commit(tools: Tools, vm: VmRow, changes: object) -> None:
    """Commit what a step did."""
    assert isinstance(changes, dict)
    finish(tools.store, Lease(table=vms, row_id=vm.id, owner="owner"), changes, due_at=0)


def test_every_step_can_be_done_twice(
    tools: Tools, services: Services, store: Store, host: LibvirtHost
) -> None:
    """From a template to a defined domain, each step is done twice and makes one thing.

    The image's name says another format than its owner, who is right.
    """
    image = services.settings.image_folders[0] / "busybox.vmdk"
    built = build_image("busybox-standalone", control=Control())
    subprocess.run(["qemu-img", "convert", "-O", "raw", built, image], check=True)
    spec = TemplateSpec(rootfs_path=str(image), mem_mib=64, format="raw")
    create_template(services, WriteTemplate(name="busybox", spec=spec))
    template = claim_template(store, "owner", 600)
    assert template is not None
    first, second = prepare(tools, template), prepare(tools, template)
    assert first.changes == second.changes
    assert first.changes["state"] == "ready"
    lease = Lease(table=templates, row_id=template.id, owner="owner")
    finish(store, lease, first.changes, due_at=0)

    vm_id = create_vm(services, CreateVm(name="x", template_id="busybox"))[0].id
    stop_vm(services, vm_id)  # it is made, and not started
    for phase in ("disk", "injected", "defined"):
        vm = claimed(store)
        outcomes = [do_step(tools, vm) for _ in range(2)]
        assert [outcome.changes["phase"] for outcome in outcomes] == [phase, phase]
        commit(tools, vm, outcomes[1].changes)
    assert host.domains() == [vm_id]
    folder = services.settings.state / "vms" / vm_id
    assert [path.name for path in folder.iterdir()] == ["disk.qcow2"]
    report = vmprovision.inspect(
        folder / "disk.qcow2",
        source=vmprovision.ImageOptions(format="qcow2", allow_backing=True),
    )
    assert report.agent is not None
    assert f"VM_ID={vm_id}".encode() in report.agent.configuration
    assert b"MANAGER_URL=http://192.168.122.1:8080" in report.agent.configuration
    row = find_vm(store, vm_id)
    assert row is not None
    assert (row.state, row.phase) == ("stopped", "defined")
    delete_vm(services, vm_id)
    vm = claimed(store)
    assert [do_step(tools, vm).is_gone for _ in range(2)] == [True, True]
    assert host.domains() == []
    assert not folder.exists()


@pytest.mark.parametrize("has_uuid", [True, False])
def test_foreign_domains_are_left_alone(
    tools: Tools, services: Services, host: LibvirtHost, tmp_path: Path, *, has_uuid: bool
) -> None:
    """A domain with the VM's name or UUID that we did not make is neither changed nor removed."""
    vm_id = create_vm(services, CreateVm(name="x", template_id="debian"))[0].id
    vm = claimed(tools.store)
    name, uuid = ("foreign", f"<uuid>{vm_id}</uuid>") if has_uuid else (vm_id, "")
    xml = tmp_path / "foreign.xml"
    xml.write_text(FOREIGN.format(name=name, uuid=uuid))
    host.run("virsh", "--quiet", "define", xml)
    before = host.run("virsh", "dumpxml", name)
    hypervisor = tools.hosts[host.uri]
    actions = (hypervisor.start, hypervisor.switch_off, hypervisor.pause, hypervisor.remove)
    for action in actions:
        with pytest.raises(HypervisorError, match="another program"):
            action(vm_id)
    with pytest.raises(HypervisorError, match="another program"):
        hypervisor.define(vm_id, FOREIGN.format(name=vm_id, uuid=f"<uuid>{vm_id}</uuid>"))
    commit(tools, vm, {"host": host.uri})
    delete_vm(services, vm_id)
    with pytest.raises(HypervisorError, match="another program"):
        do_step(tools, claimed(tools.store))
    assert host.run("virsh", "dumpxml", name) == before
    host.run("virsh", "--quiet", "undefine", name)


def test_domains_of_another_store_are_not_ours(host: LibvirtHost, services: Services) -> None:
    """Two installations on one libvirt leave each other's machines alone."""
    vm_id = "0e837eb4-67b7-4056-ba4e-8ff594888610"
    xml = FOREIGN.format(name=vm_id, uuid=f"<uuid>{vm_id}</uuid>")
    metadata = "<metadata><v:vm xmlns:v='urn:vmprovision:domain' installation='{}'/></metadata>"
    ours, other = Hypervisor(host.uri, "ours"), Hypervisor(host.uri, "other")
    ours.define(vm_id, xml.replace("<os>", metadata.format("ours") + "<os>"))
    assert ours.state_of(vm_id) == "off"
    with pytest.raises(HypervisorError, match="another program"):
        other.remove(vm_id)
    ours.remove(vm_id)
    assert ours.state_of(vm_id) == "absent"
    assert services.store.installation not in ("ours", "other")


def test_a_libvirt_that_is_gone(services: Services, tmp_path: Path) -> None:
    """It is unreachable, which is no reason to give a VM up."""
    gone = Hypervisor(f"qemu:///system?socket={tmp_path}/none", services.store.installation)
    with pytest.raises(HypervisorUnreachableError) as caught:
        gone.free_memory()
    assert "doctor --server" in caught.value.hint
