"""Build a saved appliance: boot libguestfs's own with a lean process 1, and save it.

The caller gives the folder its final name when all files are complete; ``store`` lists
them.
"""

from __future__ import annotations

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
from vmprovision.appliance.snapshot.machine import (
    COMMAND_LINE,
    IGNORE_SHARED,
    machine_options,
    memory_options,
    root_options,
    wrapper_script,
)
from vmprovision.appliance.wrapper import CHANNEL, find_binder
from vmprovision.errors import ApplianceError, ApplianceTimeoutError
from vmprovision.host.command import run
from vmprovision.host.kernel import KERNEL_VARIABLE, MODULES
from vmprovision.qemu.monitor import Connection, Listener, Monitor
from vmprovision.qemu.options import socket_options
from vmprovision.qemu.process import QemuProcess
from vmprovision.runtime.store import find_runtime, host_architecture, load

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmprovision.progress import Control
    from vmprovision.qemu.options import Accelerator

INSIDE = Path(__file__).parent.with_name("inside")
STEP = "saving an appliance, once on this host"
BEGUN, MADE, BOOTED = 0.0, 0.3, 0.9  # the share of the time on TCG that is over
WRAPPER = "qemu"
MODULES_VARIABLE = "SUPERMIN_MODULES"
README = "An appliance that vmprovision saved. This file makes it a fixed one for libguestfs.\n"
BUILD_SECONDS = 300.0  # 4 s on an idle host without KVM; a loaded CI host is much slower
KVM_BOOT_SECONDS = 20.0  # it takes 1 s; a KVM that passes its trial may still hang
ANSWER_SECONDS = 120.0
TAIL = 600


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
    _make_root(folder, sources)
    _boot_and_save(folder, sources.qemu, accelerator, control)
    wrapper = folder / WRAPPER
    wrapper.write_text(wrapper_script(sources.qemu, accelerator, find_binder()), encoding="utf-8")
    wrapper.chmod(0o700)
    (folder / "README.fixed").write_text(README, encoding="ascii")


def inside_files() -> list[Path]:
    """Return our own files that are in the appliance."""
    return sorted(
        path for path in INSIDE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )


def _make_root(folder: Path, sources: Sources) -> None:
    """Build libguestfs's appliance with our process 1 instead of its own."""
    inputs, made = folder / "supermin.d", folder / "made"
    inputs.mkdir()
    for path in sources.inputs.iterdir():
        if path.name != "init.tar.gz":
            (inputs / path.name).symlink_to(path)
    (inputs / "init.tar.gz").write_bytes(_archive())
    supermin = ("supermin", "--build", "--copy-kernel", "-f", "ext2")
    run(
        [*supermin, "--host-cpu", host_architecture(), inputs, "-o", made],
        timeout=BUILD_SECONDS,
        environment=_kernel_variables(sources.kernel),
    )
    for name in ("kernel", "initrd", "root"):
        (made / name).rename(folder / name)
    made.rmdir()
    shutil.rmtree(inputs)


def _kernel_variables(kernel: Path) -> dict[str, str]:
    """Return the variables by which supermin(1) takes this kernel and no other."""
    variables = {KERNEL_VARIABLE: str(kernel)}
    modules = MODULES / kernel.name.partition("-")[2]
    if MODULES_VARIABLE not in os.environ and modules != MODULES and modules.is_dir():
        variables[MODULES_VARIABLE] = str(modules)
    return variables


def _archive() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for path in inside_files():
            name = str(path.relative_to(INSIDE))
            _add(tar, name if name == "init" else f"usr/lib/vmprovision/{name}", path.read_bytes())
        runtime = load(find_runtime(host_architecture()))
        _add(tar, "usr/lib/vmprovision/python", runtime)
    return content.getvalue()


def _add(tar: tarfile.TarFile, place: str, content: bytes) -> None:
    entry = tarfile.TarInfo(f"./{place}")
    entry.size, entry.mode = len(content), 0o755
    tar.addfile(entry, io.BytesIO(content))


def _boot_and_save(folder: Path, qemu: Path, accelerator: Accelerator, control: Control) -> None:
    overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "root"]
    run([*overlay, folder / "root.qcow2"], timeout=60)
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
        seconds = KVM_BOOT_SECONDS if accelerator == "kvm" else BUILD_SECONDS
        _wait_until_parked(connections, process, control, seconds)
        control.step(STEP, BOOTED)
        _save(Monitor(connections[MONITOR], ANSWER_SECONDS), folder / "state")
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
        *root_options("root.qcow2"),
        *("-serial", "file:console"),
        *("-kernel", "kernel", "-initrd", "initrd", "-append", COMMAND_LINE),
    ]


def _wait_until_parked(
    connections: Mapping[str, Connection],
    process: QemuProcess,
    control: Control,
    seconds: float,
) -> None:
    deadline = time.monotonic() + seconds
    while connections[ATTENDANT].receive_soon(0.1) != "parked":
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
