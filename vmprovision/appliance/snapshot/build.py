"""Build a saved appliance: boot libguestfs's own with a lean process 1, and save it.

The caller gives the folder its final name when all files are complete; ``store`` lists
them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import os
import shlex
import shutil
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.appliance.handle import ATTENDANT, MONITOR
from vmprovision.appliance.snapshot.initrd import initrd_content
from vmprovision.appliance.snapshot.machine import (
    COMMAND_LINE,
    IGNORE_SHARED,
    ROOT_DEVICE,
    machine_options,
    memory_options,
    wrapper_script,
)
from vmprovision.appliance.snapshot.scratch import SCRATCH, make_scratch_disk
from vmprovision.appliance.wrapper import CHANNEL, find_binder
from vmprovision.errors import ApplianceError, ApplianceTimeoutError
from vmprovision.host.command import run
from vmprovision.host.kernel import KERNEL_VARIABLE, MODULES_VARIABLE, modules_of
from vmprovision.qemu.monitor import Connection, Listener, Monitor
from vmprovision.qemu.options import socket_options
from vmprovision.qemu.process import QemuProcess
from vmprovision.runtime.store import find_runtime, host_architecture, load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.progress import Control
    from vmprovision.qemu.options import Accelerator

INSIDE = Path(__file__).parent.with_name("inside")
STEP = "saving an appliance, once on this host"
BEGUN, MADE, BOOTED = 0.0, 0.5, 0.9  # the share of the time on TCG that is over
WRAPPER = "qemu"
README = "An appliance that vmprovision saved. This file makes it a fixed one for libguestfs.\n"
BUILD_SECONDS = 300.0  # 4 s on an idle host without KVM; a loaded CI host is much slower
KVM_BOOT_SECONDS = 20.0  # it takes 1 s; a KVM that passes its trial may still hang
ANSWER_SECONDS = 120.0
POLL_SECONDS = 0.1
TAIL = 600
SUPERMIN = ("supermin", "--build", "-f", "ext2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a saved appliance is built from.

    Attributes:
        inputs: the supermin inputs of libguestfs's appliance.
        kernel: the host's kernel for it.
        qemu: the QEMU that saves it.
    """

    inputs: Path
    kernel: Path
    qemu: Path


def build(folder: Path, sources: Sources, accelerator: Accelerator, control: Control) -> None:
    """Build all files of a saved appliance in an empty folder.

    Args:
        folder: the build directory.
        sources: what it is built from.
        accelerator: what it runs on.
        control: progress and cancellation.

    Raises:
        CommandError: supermin or qemu-img failed.
        ApplianceError: the appliance does not come up, or cannot be saved.
    """
    control.step(STEP, BEGUN)
    shutil.copyfile(sources.kernel, folder / "kernel")
    runtime = load(find_runtime(host_architecture()))
    files = {"python": runtime, "init": b"#!/python\n" + (INSIDE / "init.py").read_bytes()}
    content = initrd_content(modules_of(sources.kernel), files)
    (folder / "initrd").write_bytes(content)
    make_scratch_disk(folder / SCRATCH)
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        root = beside.submit(_make_root, folder, sources, runtime, control)
        _boot_and_save(folder, sources.qemu, accelerator, control, root)
    wrapper = folder / WRAPPER
    wrapper.write_text(wrapper_script(sources.qemu, accelerator, find_binder()), encoding="utf-8")
    wrapper.chmod(0o700)
    (folder / "README.fixed").write_text(README, encoding="ascii")


def inside_files() -> list[Path]:
    """Return our own files that are in the appliance."""
    return sorted(
        path for path in INSIDE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )


def _make_root(folder: Path, sources: Sources, runtime: bytes, control: Control) -> None:
    """Build the root of libguestfs's appliance with our own files in place of its process 1."""
    inputs, made = folder / "supermin.d", folder / "made"
    inputs.mkdir()
    for path in sources.inputs.iterdir():
        if path.name != "init.tar.gz":
            (inputs / path.name).symlink_to(path)
    (inputs / "init.tar.gz").write_bytes(_archive(runtime))
    run(
        [*SUPERMIN, "--host-cpu", host_architecture(), inputs, "-o", made],
        timeout=BUILD_SECONDS,
        environment=_kernel_variables(sources.kernel),
        cancelled=control.cancelled,
    )
    (made / "root").rename(folder / "root")
    shutil.rmtree(made)
    shutil.rmtree(inputs)
    overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "root"]
    run([*overlay, folder / "root.qcow2"], timeout=60)


def _kernel_variables(kernel: Path) -> dict[str, str]:
    """Return the variables by which supermin(1) takes this kernel and no other."""
    return {KERNEL_VARIABLE: str(kernel), MODULES_VARIABLE: str(modules_of(kernel))}


def _archive(runtime: bytes) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name in ("attendant.py", "volumes"):
            _add(tar, name, (INSIDE / name).read_bytes())
        _add(tar, "python", runtime)
    return content.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(f"./usr/lib/vmprovision/{name}")
    entry.size, entry.mode = len(content), 0o755
    tar.addfile(entry, io.BytesIO(content))


def _boot_and_save(
    folder: Path,
    qemu: Path,
    accelerator: Accelerator,
    control: Control,
    root: concurrent.futures.Future[None],
) -> None:
    """Boot a machine, give it its root as soon as that is made, and save it."""
    with contextlib.ExitStack() as stack:
        # QEMU runs in the folder, and by this name no path is too long for a socket
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, handle)
        listeners = {}
        for name in (ATTENDANT, MONITOR):
            listeners[name] = Listener(Path(f"/proc/self/fd/{handle}") / name)
            stack.callback(listeners[name].close)
            stack.callback((folder / name).unlink, missing_ok=True)
        stack.callback((folder / CHANNEL).unlink, missing_ok=True)
        command = [str(qemu), *_booted_machine(accelerator)]
        process = stack.enter_context(_running(command, folder))
        connections = {}
        for name, listener in listeners.items():
            connections[name] = listener.accept(ANSWER_SECONDS, process.is_running)
            stack.callback(connections[name].close)
        monitor = Monitor(connections[MONITOR], ANSWER_SECONDS)
        _wait_for_root(root, process, control)
        _plug_in_root(monitor)
        seconds = KVM_BOOT_SECONDS if accelerator == "kvm" else BUILD_SECONDS
        _wait_until_parked(connections[ATTENDANT], process, control, seconds)
        control.step(STEP, BOOTED)
        _save(monitor, folder / "state")
        if not process.wait(ANSWER_SECONDS):
            raise ApplianceTimeoutError("QEMU did not end after it saved the appliance")
    (folder / "console").unlink()


def _booted_machine(accelerator: Accelerator) -> list[str]:
    """Return the options of the machine that is saved; it runs in the build directory.

    Nobody connects to guestfsd's channel, so guestfsd waits there until it is restored.
    """
    return [
        *("-chardev", f"socket,id={CHANNEL},path={CHANNEL},server=on,wait=off"),
        *(word for name in (ATTENDANT, MONITOR) for word in socket_options(name, name)),
        *machine_options(accelerator),
        *memory_options(".", share=True),
        *("-serial", "file:console"),
        *("-kernel", "kernel", "-initrd", "initrd", "-append", COMMAND_LINE),
    ]


def _wait_for_root(
    root: concurrent.futures.Future[None], process: QemuProcess, control: Control
) -> None:
    """Wait until the root is made, while the machine's kernel starts.

    Raises:
        CommandError: it cannot be made.
        ApplianceError: the machine has ended.
        CancelledError: the caller cancelled.
    """
    while not concurrent.futures.wait([root], POLL_SECONDS).done:
        control.step(STEP, BEGUN)
        if not process.is_running():
            raise ApplianceError("the appliance did not boot")
    root.result()
    control.step(STEP, MADE)


def _plug_in_root(monitor: Monitor) -> None:
    root = {"driver": "file", "filename": "root.qcow2", "cache": {"no-flush": True}}
    monitor.ask("blockdev-add", driver="qcow2", node_name="appliance", file=root)
    monitor.ask("device_add", **ROOT_DEVICE)


def _wait_until_parked(
    attendant: Connection,
    process: QemuProcess,
    control: Control,
    seconds: float,
) -> None:
    deadline = time.monotonic() + seconds
    while attendant.receive_soon(POLL_SECONDS) != "parked":
        control.step(STEP, MADE)
        if not process.is_running():
            raise ApplianceError("the appliance did not boot")
        if time.monotonic() > deadline:
            raise ApplianceTimeoutError(f"the appliance did not boot within {seconds:.0f} s")


def _save(monitor: Monitor, state: Path) -> None:
    monitor.ask("stop")
    monitor.ask("migrate-set-capabilities", capabilities=[IGNORE_SHARED])
    monitor.ask("migrate-set-parameters", max_bandwidth=1 << 40)
    monitor.ask("migrate", uri=f"exec:cat > {shlex.quote(str(state))}")
    monitor.wait_for_migration(ANSWER_SECONDS)
    monitor.ask("quit")


@contextlib.contextmanager
def _running(command: list[str], folder: Path) -> Iterator[QemuProcess]:
    """Run QEMU in a folder for the length of the block; add to an error what it printed."""
    errors = folder / "errors"
    with errors.open("wb") as output:
        try:
            with QemuProcess(command, output=output, errors=output, folder=folder) as process:
                yield process
        except ApplianceError as exc:
            printed = [_tail(errors), _tail(folder / "console")]
            raise type(exc)(" ".join([exc.message, *filter(None, printed)])) from exc
    errors.unlink()


def _tail(path: Path) -> str:
    """Return the end of a file of text as one line."""
    try:
        words = path.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return ""
    return " ".join(words)[-TAIL:]
