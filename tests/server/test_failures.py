"""What cannot become a VM: each ends in a state, names its image, and leaves nothing behind."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from typing import TYPE_CHECKING, Any

import pytest

import vmprovision
from tests.image.layouts import cached_disks
from tests.server.libvirt_host import (
    LibvirtHost,
    Server,
    running,
    wait_until,
)
from vmprovision.appliance.session import Drive, open_appliance
from vmprovision.progress import Control
from vmprovision.recipe import build_image

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

pytestmark = [pytest.mark.appliance, pytest.mark.boot, pytest.mark.slow]

ROOM_MB = 160  # for the template, and for one VM that is made


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder for images."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def create(client: httpx.Client, template: str) -> str:
    """Create a VM; return its id."""
    made = client.post("/v1/vms", json={"name": "x", "template_id": template})
    assert made.status_code == 202, made.text
    return str(made.json()["id"])


def remove_all(client: httpx.Client) -> None:
    """Delete every VM, then every template; wait until all are gone."""
    for kind in ("vms", "templates"):
        for item in client.get(f"/v1/{kind}").json()["items"]:
            client.delete(f"/v1/{kind}/{item['id']}")
        wait_until(f"no {kind}", lambda kind=kind: not client.get(f"/v1/{kind}").json()["items"])


def assert_nothing_is_left(server: Server, image: Path) -> None:
    """Check that there is neither a domain nor a file nor a lock."""
    assert server.host.domains() == []
    folders = [server.state / kind for kind in ("vms", "templates")]
    left = server.host.run("find", *folders, "-mindepth", "1", check=False)
    assert left == ""
    with image.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_windows_image(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """It is refused, with its name; where no agent is needed, its VM is silent in the end."""
    image = images / "windows.qcow2"
    shutil.copyfile(cached_disks().path("windows"), image)
    before = digest(image)
    spec: dict[str, Any] = {"rootfs_path": str(image), "mem_mib": 128}
    options = ["--report-timeout", "3"]
    server = Server(host=host, state=tmp_path / "state", images=images, options=options)
    with running(server), server.client() as client:
        refused = [
            client.post("/v1/templates", json={"name": "windows", "spec": spec}),
            client.post("/v1/vms", json={"name": "x", "vcpu": 1, **spec}),
        ]
        for answer in refused:
            problem = answer.json()
            assert (answer.status_code, problem["exit_code"]) == (422, 34)
            assert problem["image"] == str(image)
            assert "Windows" in problem["detail"]
        assert_nothing_is_left(server, image)
        assert client.get("/v1/vms").json()["items"] == []
        server.register("windows", image, agent="optional")
        vm_id = create(client, "windows")
        found = server.in_phase(vm_id, "silent")
        assert found["state"] == "failed"
        assert found["error"]["image"] == str(image)
        remove_all(client)
        assert_nothing_is_left(server, image)
    assert digest(image) == before


def test_a_guest_that_panics(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """It is silent long before the time for reports is over, with the panic on its console.

    A start after a stop boots it again, and what an earlier boot printed is not taken for news.
    """
    image = images / "panics.qcow2"
    build_image("busybox-standalone", output=image, control=Control())
    with open_appliance([Drive(path=image, format="qcow2")], control=Control()) as appliance:
        appliance.call("mount", "/dev/sda", "/")
        (initrd,) = appliance.call("glob_expand", "/boot/initrd.img-*")
        appliance.call("write", initrd, b"no initrd at all\n" * 64)
        appliance.call("umount_all")
    server = Server(host=host, state=tmp_path / "state", images=images)
    with running(server), server.client() as client:
        server.register("panics", image)
        vm_id = create(client, "panics")
        for count in (1, 2):
            found = server.in_phase(vm_id, "silent")
            assert (found["state"], found["error"]["exit_code"]) == ("failed", 70)
            assert found["error"]["image"] == str(image)
            assert "kernel panicked" in found["error"]["detail"]
            assert f"/v1/vms/{vm_id}/start" in found["error"]["hint"]
            console = "\n".join(found["error"]["console"])
            assert "Kernel panic - not syncing" in console
            log = (host.folder / "log/qemu" / f"{vm_id}.log").read_text("utf-8", "replace")
            assert log.count("starting up libvirt version") == count
            client.post(f"/v1/vms/{vm_id}/stop")
            stopped = wait_until("the stop", lambda: in_state(server, vm_id, "stopped"))
            assert (stopped["phase"], stopped["error"]) == ("defined", None)
            client.post(f"/v1/vms/{vm_id}/start")
        remove_all(client)
        assert_nothing_is_left(server, image)


def test_a_silent_machine_that_is_off_starts_again(
    host: LibvirtHost, images: Path, tmp_path: Path
) -> None:
    """What ended before its agent reported gets a new machine by a start."""
    image = images / "busybox.qcow2"
    build_image("busybox-standalone", output=image, control=Control())
    server = Server(host=host, state=tmp_path / "state", images=images)
    with running(server), server.client() as client:
        server.register("busybox", image)
        vm_id = create(client, "busybox")
        server.in_phase(vm_id, "started", "reporting")
        host.run("virsh", "--quiet", "destroy", vm_id)
        server.in_phase(vm_id, "silent")
        client.post(f"/v1/vms/{vm_id}/start")
        server.in_phase(vm_id, "ready")
        remove_all(client)
        assert_nothing_is_left(server, image)


@pytest.mark.parametrize("room_kb", [0, 4096])
def test_a_full_disk(host: LibvirtHost, images: Path, tmp_path: Path, room_kb: int) -> None:
    """A VM without room for its disk, or for its injection, fails whole; with room it is made.

    The database is elsewhere: a server that cannot write it can promise nothing.
    """
    image = images / "busybox.qcow2"
    build_image("busybox-standalone", output=image, control=Control())
    before = digest(image)
    state = small_disk(host, tmp_path)
    options = ["--database", str(tmp_path / "server.db")]
    server = Server(host=host, state=state, images=images, options=options)
    with running(server), server.client() as client:
        server.register("busybox", image)
        fill(host, state, room_kb)
        vm_id = create(client, "busybox")
        found = wait_until("the failure", lambda: in_state(server, vm_id, "failed"))
        assert (found["phase"], found["error"]["exit_code"]) == ("requested", 16)
        assert found["error"]["status"] == 507
        assert str(state / "vms" / vm_id) in found["error"]["detail"]
        assert found["error"]["hint"]
        assert host.domains() == []
        assert host.run("find", state / "vms", "-mindepth", "1") == ""
        host.run("rm", state / "filler")
        client.post(f"/v1/vms/{vm_id}/start")
        server.in_phase(vm_id, "ready")
        remove_all(client)
        assert_nothing_is_left(server, image)
    assert digest(image) == before


def test_a_guest_without_room(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """A guest that cannot write stands still, and says why; with room it goes on by itself."""
    image = images / "busybox.qcow2"
    build_image("busybox-standalone", output=image, control=Control())
    state = small_disk(host, tmp_path)
    options = ["--database", str(tmp_path / "server.db")]
    server = Server(host=host, state=state, images=images, options=options)
    with running(server), server.client() as client:
        server.register("busybox", image)
        vm_id = create(client, "busybox")
        client.post(f"/v1/vms/{vm_id}/stop")
        server.in_phase(vm_id, "defined")
        fill(host, state, 0)
        client.post(f"/v1/vms/{vm_id}/start")
        error = wait_until("the error", lambda: server.vm(vm_id)["error"])
        assert (error["exit_code"], error["status"]) == (16, 507)
        assert "disk.qcow2 cannot grow" in error["detail"]
        assert server.vm(vm_id)["state"] == "paused"
        host.run("rm", state / "filler")
        assert server.in_phase(vm_id, "ready")["error"] is None
        remove_all(client)
        assert_nothing_is_left(server, image)


def test_a_full_disk_under_the_database(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """A request that cannot be written down is refused, and nothing has begun."""
    image = images / "busybox.qcow2"
    build_image("busybox-standalone", output=image, control=Control())
    state = small_disk(host, tmp_path)
    server = Server(host=host, state=state, images=images)
    with running(server), server.client() as client:
        server.register("busybox", image)
        fill(host, state, 0)
        answers = [
            client.post("/v1/vms", json={"name": f"vm-{number}", "template_id": "busybox"})
            for number in range(40)
        ]
        refused = [answer.json() for answer in answers if answer.status_code != 202]
        assert refused
        assert {problem["status"] for problem in refused} == {507}
        assert {problem["exit_code"] for problem in refused} == {16}
        host.run("rm", state / "filler")
        remove_all(client)
        assert_nothing_is_left(server, image)


def small_disk(host: LibvirtHost, folder: Path) -> Path:
    """Return a folder on a small filesystem, which the host sees and this test does not."""
    state = folder / "state"
    state.mkdir()
    host.run("mount", "-t", "tmpfs", "-o", f"size={ROOM_MB}m,mode=711", "tmpfs", state)
    return state


def fill(host: LibvirtHost, folder: Path, room_kb: int) -> None:
    """Fill a filesystem but for some room."""
    free = int(host.run("stat", "--file-system", "--format", "%f", folder)) * 4 - room_kb
    host.run("fallocate", "--length", f"{free}KiB", folder / "filler")


def in_state(server: Server, vm_id: str, state: str) -> dict[str, Any] | None:
    """Return a VM if it is in this state."""
    item = server.vm(vm_id)
    return item if item["state"] == state else None


def test_another_image_for_a_template(host: LibvirtHost, images: Path, tmp_path: Path) -> None:
    """A template that gets another image is prepared from that one, not from what it had."""
    names = {"busybox": "busybox-standalone", "script": "busybox-script"}
    for name, recipe in names.items():
        build_image(recipe, output=images / f"{name}.qcow2", control=Control())
    server = Server(host=host, state=tmp_path / "state", images=images)
    with running(server), server.client() as client:
        path = f"/v1/templates/{server.register('x', images / 'busybox.qcow2')}"
        spec = {"rootfs_path": str(images / "script.qcow2"), "mem_mib": 128}
        assert client.put(path, json={"name": "x", "spec": spec}).status_code == 200
        wait_until("ready", lambda: client.get(path).json()["item"]["state"] == "ready")
        prepared = server.state / "templates" / path.rpartition("/")[2] / "image"
        source = vmprovision.ImageOptions(format="qcow2")
        own = vmprovision.inspect(images / "script.qcow2")
        found = vmprovision.inspect(prepared, source=source)
        assert found.init.system == own.init.system != "busybox"
        remove_all(client)
        assert_nothing_is_left(server, images / "script.qcow2")
