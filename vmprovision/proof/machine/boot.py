"""Boot a guest once, on a throwaway overlay, and query it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import platform
import re
import stat
import tempfile
import time
import urllib.parse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision.errors import ProofError, UnsupportedGuestError
from vmprovision.image.diskfile import name_of
from vmprovision.proof.machine.console import last_lines
from vmprovision.proof.machine.options import (
    HARDWARE,
    MANAGER_URL,
    board_options,
    boot_options,
    disk_options,
    find_qemu,
    network_options,
)
from vmprovision.proof.machine.watch import Watch, open_channels
from vmprovision.qemu.accelerator import choose_accelerator

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vmprovision.appliance.drives import Drive
    from vmprovision.progress import Control
    from vmprovision.proof.machine.options import BootSource

POLL_SECONDS = 0.3
REQUEST_SECONDS = 3.0
ANSWER_BYTES = 64 << 10
CONSOLE_LINES = 40  # console lines in an error

_FORWARDED = re.compile(r"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)")


class Machine:
    """A running machine; made by ``boot``."""

    def __init__(self, watch: Watch, agent_url: str) -> None:
        """Keep the running QEMU, and the URL of its forwarded port."""
        self._watch = watch
        self.agent_url = agent_url
        self.manager_url = MANAGER_URL

    def console_tail(self, count: int) -> list[str]:
        """Return the last lines of the console that are not blank, safe to print."""
        return last_lines(self._watch.console(), count)

    def is_running(self) -> bool:
        """Return whether QEMU runs; its guest may have halted."""
        return self._watch.is_running()

    def exit_reason(self) -> str:
        """Return why the guest can no longer come up, as words; empty while it can."""
        return self._watch.exit_reason()

    def check(self) -> None:
        """Check that the guest may still come up.

        Raises:
            ProofError: the machine has ended, or the guest's kernel has panicked.
            CancelledError: the caller cancelled.
        """
        self._watch.raise_cancelled()
        reason = self.exit_reason()
        if reason:
            raise ProofError(
                f"the guest did not come up: {reason}", console=self.console_tail(CONSOLE_LINES)
            )


@contextlib.contextmanager
def boot(  # noqa: PLR0913 -- all but the disk by name
    disk: Drive,
    *,
    source: BootSource,
    agent_port: int,
    manager: str,
    control: Control,
    arch: str = "x86_64",
    memory_mb: int = 512,
    seconds: float = 900.0,
    console_log: Path | None = None,
    firmware: Sequence[str] = (),
) -> Iterator[Machine]:
    """Boot a machine from the disk, and end it with the block.

    Args:
        disk: a throwaway overlay that the guest writes to.
        source: the boot loader of the disk, or a kernel.
        agent_port: the guest's port that ``Machine.agent_url`` leads to; the guest
            must take its address by DHCP.
        manager: ``HOST:PORT`` on loopback, where the guest's connections to
            ``Machine.manager_url`` end.
        control: progress and cancelling, which ends the machine.
        arch: the guest's architecture, as uname(1) names it.
        memory_mb: the guest's memory in MiB.
        seconds: how long the machine may run.
        console_log: a file that gets the console's first 16 MiB unchanged.
        firmware: options of qemu-system(1) that identify the machine to the guest:
            ``-uuid``, ``-smbios``, ``-fw_cfg``.

    Raises:
        ProofError: QEMU is missing or did not start.
        UnsupportedGuestError: this version boots no guests of that architecture.
        CancelledError: the caller cancelled.
    """
    control.step("starting the machine")
    hardware = HARDWARE.get(arch)
    if hardware is None:
        raise UnsupportedGuestError(f"this version cannot boot guests for {arch}")
    qemu = find_qemu(arch, hardware)
    native = platform.machine() in hardware.natively
    accelerator = choose_accelerator(qemu).accelerator if native else "tcg"
    with (
        tempfile.TemporaryFile(prefix="vmprovision-qemu-") as errors,
        open_channels() as channels,
        _open_source(source) as (opened, files),
    ):
        command = [
            str(qemu),
            *board_options(hardware, accelerator, memory_mb),
            *boot_options(opened),
            *firmware,
            *disk_options(hardware, disk.describe(name_of), disk.sectors),
            *network_options(hardware, agent_port, manager),
            *channels.options(),
        ]
        disk_files = disk.layer.files() if disk.layer else ()
        watch = Watch(
            command,
            channels,
            errors,
            control,
            files=[*files, *(file.handle for file in disk_files)],
            seconds=seconds,
            console_log=console_log,
        )
        try:
            yield Machine(watch, f"http://127.0.0.1:{_forwarded_port(watch)}")
        finally:
            watch.stop()


@contextlib.contextmanager
def _open_source(source: BootSource) -> Iterator[tuple[BootSource, list[int]]]:
    """Open the files that boot the guest; return the source with the names that QEMU opens."""
    with contextlib.ExitStack() as stack:
        files: list[int] = []

        def opened(path: Path | None) -> Path | None:
            if path is None:
                return None
            files.append(_open_regular(path, stack))
            return Path(name_of(files[-1]))

        named = replace(
            source,
            firmware=opened(source.firmware),
            kernel=opened(source.kernel),
            initrd=opened(source.initrd),
        )
        yield named, files


def _open_regular(path: Path, stack: contextlib.ExitStack) -> int:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise ProofError(f"{path} cannot be read: {exc.strerror}", hint="check the path") from exc
    stack.callback(os.close, handle)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise ProofError(
            f"{path} is not a regular file", hint="give the file of a kernel or an initrd"
        )
    return handle


def wait_for_http(
    url: str,
    deadline: float,
    machine: Machine,
    *,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the JSON object that the guest sends, once it answers a GET with status 200.

    Args:
        url: a URL below ``machine.agent_url``.
        deadline: in seconds of ``time.monotonic()``.
        machine: checked between the attempts.
        headers: sent with each request.

    Raises:
        ProofError: no such answer came in time, the machine has ended, or the
            guest's kernel has panicked.
        CancelledError: the caller cancelled.
    """
    last = "no connection was accepted"
    while True:
        try:
            return _get_json(url, headers or {})
        except (OSError, http.client.HTTPException, ValueError) as exc:
            last = f"{exc}" or type(exc).__name__
        machine.check()
        if time.monotonic() > deadline:
            raise ProofError(
                f"the guest did not answer {url} in time: {last}",
                console=machine.console_tail(CONSOLE_LINES),
                hint="read the console's last lines; without KVM guests boot slowly",
            )
        time.sleep(POLL_SECONDS)


def _get_json(url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    where = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(
        str(where.hostname), where.port, timeout=REQUEST_SECONDS
    )
    try:
        connection.request("GET", where.path or "/", headers=dict(headers))
        response = connection.getresponse()
        body = response.read(ANSWER_BYTES)
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        raise ValueError(f"HTTP status {response.status}")
    try:
        answer = json.loads(body)
    except RecursionError:
        answer = None
    if not isinstance(answer, dict):
        raise ValueError("the answer is not a JSON object")  # noqa: TRY004 -- a value from the wire
    return answer


def _forwarded_port(watch: Watch) -> int:
    """Return the port that QEMU chose; no other program can take it in between."""
    printed = watch.ask("human-monitor-command", command_line="info usernet")
    found = _FORWARDED.search(str(printed))
    if found is None:
        raise ProofError(f"QEMU does not name the port that it forwards: {printed}")
    return int(found[1])
