"""Make a saved appliance: libguestfs's own with a lean process 1, booted once and saved.

All files are made in a folder of another name, which gets its own when they are
complete; ``saved`` says what they are.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import shutil
import socket
import subprocess
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.appliance.snapshot.hardware import (
    ATTENDANT,
    CHANNEL,
    COMMAND_LINE,
    IGNORE_SHARED,
    MONITOR,
    machine_options,
    memory_options,
    root_options,
    socket_options,
    wrapper_script,
)
from vmprovision.errors import ApplianceError, ApplianceTimeoutError
from vmprovision.host.command import run
from vmprovision.qemu import lifeline
from vmprovision.qemu.monitor import Connection, Listener, Monitor
from vmprovision.runtime.store import find_runtime, host_architecture, load

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmprovision.progress import Control
    from vmprovision.qemu.accelerator import Accelerator

log = logging.getLogger(__name__)

INSIDE = Path(__file__).parent.with_name("inside")
STEP = "saving an appliance, once on this host"
BEGUN, MADE, BOOTED = 0.0, 0.3, 0.9  # how much of it is done, by the time that it takes on TCG
WRAPPER = "qemu"
EARLY = "vmprovision.park=early"  # what tells inside/init not to wait for guestfsd
README = "An appliance that vmprovision has saved; libguestfs takes the folder for a fixed one.\n"
BUILD_SECONDS = 300.0  # 4 s on an idle host without KVM; a loaded CI host is far slower
KVM_BOOT_SECONDS = 20.0  # it takes one; a KVM that passes its trial may still hang
ANSWER_SECONDS = 120.0
TAIL = 600


class NotParkedError(Exception):
    """guestfsd was ready to serve before the appliance could be saved."""


def build(
    workshop: Path, inputs: Path, qemu: Path, accelerator: Accelerator, control: Control
) -> None:
    """Make all files of a saved appliance in an empty folder.

    Args:
        workshop: the folder.
        inputs: what supermin makes libguestfs's appliance of.
        qemu: the QEMU to save it with.
        accelerator: what it runs on.
        control: progress and cancellation.

    Raises:
        CommandError: supermin or qemu-img failed.
        ApplianceError: the appliance does not come up, or cannot be saved.
    """
    control.step(STEP, BEGUN)
    _make_root(workshop, inputs)
    try:
        _boot_and_save(workshop, qemu, accelerator, control, COMMAND_LINE)
    except NotParkedError:
        log.info("this guestfsd does not list the disks as it starts: it is saved before that")
        _boot_and_save(workshop, qemu, accelerator, control, f"{COMMAND_LINE} {EARLY}")
    wrapper = workshop / WRAPPER
    wrapper.write_text(wrapper_script(qemu, accelerator), encoding="utf-8")
    wrapper.chmod(0o700)
    (workshop / "README.fixed").write_text(README, encoding="ascii")


def inside_files() -> list[Path]:
    """What of ours is in the appliance."""
    return sorted(
        path for path in INSIDE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )


def _make_root(workshop: Path, original: Path) -> None:
    """Make the appliance of libguestfs's inputs, with our process 1 in place of its own."""
    inputs, made = workshop / "supermin.d", workshop / "made"
    inputs.mkdir()
    for path in original.iterdir():
        if path.name != "init.tar.gz":
            (inputs / path.name).symlink_to(path)
    (inputs / "init.tar.gz").write_bytes(_archive())
    supermin = ("supermin", "--build", "--copy-kernel", "-f", "ext2")
    run(
        [*supermin, "--host-cpu", host_architecture(), inputs, "-o", made],
        timeout=BUILD_SECONDS,
    )
    for name in ("kernel", "initrd", "root"):
        (made / name).rename(workshop / name)
    made.rmdir()
    shutil.rmtree(inputs)


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


def _boot_and_save(
    workshop: Path, qemu: Path, accelerator: Accelerator, control: Control, command_line: str
) -> None:
    overlay = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "root"]
    run([*overlay, workshop / "root.qcow2"], timeout=60)
    with contextlib.ExitStack() as s:
        # QEMU runs in the folder, and by this name no path is too long for a socket
        folder = os.open(workshop, os.O_RDONLY | os.O_DIRECTORY)
        s.callback(os.close, folder)
        argv, listeners = [str(qemu)], {}
        for name in (CHANNEL, ATTENDANT, MONITOR):
            listeners[name] = Listener(Path(f"/proc/self/fd/{folder}") / name)
            s.callback(listeners[name].close)
            s.callback((workshop / name).unlink, missing_ok=True)
            argv += socket_options(name, name)
        argv += [
            *machine_options(accelerator),
            *memory_options(".", share=True),
            *root_options("root.qcow2"),
            *("-serial", "file:console"),
            *("-kernel", "kernel", "-initrd", "initrd", "-append", command_line),
        ]
        process = s.enter_context(_started(argv, workshop))
        connections = {}
        for name, listener in listeners.items():
            connections[name] = listener.accept(ANSWER_SECONDS, lambda: process.poll() is None)
            s.callback(connections[name].close)
        seconds = KVM_BOOT_SECONDS if accelerator == "kvm" else BUILD_SECONDS
        _wait_until_parked(connections, process, control, seconds)
        control.step(STEP, BOOTED)
        _save(Monitor(connections[MONITOR], ANSWER_SECONDS), workshop / "state")
        process.wait(ANSWER_SECONDS)
    (workshop / "console").unlink()


def _wait_until_parked(
    connections: Mapping[str, Connection],
    process: subprocess.Popen[bytes],
    control: Control,
    seconds: float,
) -> None:
    deadline = time.monotonic() + seconds
    while connections[ATTENDANT].receive_soon(0.1) != "parked":
        control.step(STEP, MADE)
        if connections[CHANNEL].has_data():
            raise NotParkedError
        if process.poll() is not None:
            raise ApplianceError("it did not come up")
        if time.monotonic() > deadline:
            raise ApplianceTimeoutError(f"it did not come up within {seconds:.0f} s")


def _save(monitor: Monitor, state: Path) -> None:
    monitor.ask("stop")
    monitor.ask("migrate-set-capabilities", capabilities=[IGNORE_SHARED])
    monitor.ask("migrate-set-parameters", max_bandwidth=1 << 40)
    monitor.ask("migrate", uri=f"exec:cat > {shlex.quote(str(state))}")
    monitor.wait_for_migration(ANSWER_SECONDS)
    monitor.ask("quit")


@contextlib.contextmanager
def _started(argv: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU that ends with this block, or with this process."""
    ours, theirs = socket.socketpair()
    errors = folder / "errors"
    with ours, errors.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 -- an argument list, never a shell
            lifeline.bound_to(theirs.fileno(), argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno()],
            cwd=folder,
            start_new_session=True,
        )
        theirs.close()
        try:
            yield process
        except ApplianceError as exc:
            told = [_tail(errors), _tail(folder / "console")]
            raise type(exc)(" ".join([exc.message, *filter(None, told)])) from exc
        finally:
            ours.close()
            process.wait()
    errors.unlink()


def _tail(path: Path) -> str:
    """The last of what was printed into a file, on one line."""
    try:
        words = path.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return ""
    return " ".join(words)[-TAIL:]
