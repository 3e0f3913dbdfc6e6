"""Boot a throwaway copy of an image and check from outside that the agent works.

Only an overlay is written to. It is inspected, its agent is pointed at a manager that
this module plays, and a QEMU machine boots it with no network but loopback.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.drives import drive_of
from vmprovision.appliance.session import disk_sectors
from vmprovision.appliance.snapshots import finish_snapshot
from vmprovision.changes.receipt import CONFIGURATION
from vmprovision.errors import PlanError, ProofError, about_image
from vmprovision.filesystem.protocol import Attributes
from vmprovision.guest.configuration import parse_configuration, port_in, update_configuration
from vmprovision.host.workspace import workspace
from vmprovision.image.disk import create_throwaway, open_image
from vmprovision.initsystem import definition_of
from vmprovision.progress import Control
from vmprovision.proof.bootsource import find_start
from vmprovision.proof.machine import (
    MANAGER_URL,
    Machine,
    boot,
    wait_for_http,
)
from vmprovision.proof.report_listener import Report, ReportListener
from vmprovision.reports import ImageOptions
from vmprovision.target import Access, open_guest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vmprovision.appliance.drives import Drive
    from vmprovision.guest.facts import GuestInfo, InstalledAgent
    from vmprovision.inspection.boot import Firmware
    from vmprovision.proof.bootsource import BootStart

READING_GAP = 1.2  # seconds between two readings: uptime counts whole ones
DEFAULT_VM_ID = "vmprovision-proof"

# the facts of the wire contract: name -> check of the value
INTEGERS = ("memory_used_kb", "memory_total_kb", "memory_available_kb", "uptime_seconds")
PERCENTAGES = ("cpu_usage_percent", "memory_usage_percent")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofOptions:
    """How a guest is to be booted.

    Attributes:
        kernel: a kernel of the host, for a guest without a boot loader or kernel.  If given,
            it is always used.
        initrd: the initrd that belongs to it.
        firmware: the firmware that must start the image's own boot loader; None chooses a PC's
            BIOS if the image has a boot loader for it, else UEFI.
        timeout: seconds for the boot and all checks together.
    """

    kernel: Path | None = None
    initrd: Path | None = None
    firmware: Firmware | None = None
    timeout: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofReport:
    """The answers of a booted guest.

    Attributes:
        booted_by: ``boot loader``, ``own kernel`` or ``given kernel``.
        checks: the checks that passed, in sentences.
        seconds: from power-on to the agent's first answer.
    """

    image: Path
    init: str
    booted_by: str
    checks: tuple[str, ...]
    health: dict[str, Any]
    metrics: dict[str, Any]
    information: dict[str, Any]
    guest_ip: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the report as ``vmprovision prove --json`` prints it."""
        return {
            "image": str(self.image),
            "init": self.init,
            "booted_by": self.booted_by,
            "checks": list(self.checks),
            "health": self.health,
            "metrics": self.metrics,
            "info": self.information,
            "guest_ip": self.guest_ip,
            "seconds": round(self.seconds, 1),
        }


def prove(
    image: Path | str,
    options: ProofOptions | None = None,
    *,
    source: ImageOptions | None = None,
    control: Control | None = None,
) -> ProofReport:
    """Boot a throwaway copy of the image; return what its agent answered.

    The image is not written to, and is locked against writers meanwhile.

    Raises:
        PlanError: the guest has no agent.
        ProofError: it did not boot, or its agent's answers are wrong.  The error has the
            console's last lines.
        VmprovisionError: otherwise as ``inspect``.
    """
    path = Path(image)
    options, source, control = (
        options or ProofOptions(),
        source or ImageOptions(),
        control or Control(),
    )
    access = Access(source=source, control=control)
    with about_image(path):
        if source.disks:
            raise PlanError(
                "prove does not boot guests on several disks",
                hint="start the guest, and query the agent in it",
            )
        with (
            open_image(
                path,
                stated_format=source.format,
                write=False,
                control=control,
                allow_outside=source.allow_backing,
            ) as opened,
            workspace("proof") as folder,
            create_throwaway(folder / "throwaway.qcow2", opened) as layer,
        ):
            subject = _prepare(drive_of(layer), folder, options, access)
            return _boot_and_check(path, subject, options, control)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """The facts about the guest that is about to boot."""

    guest: GuestInfo
    agent: InstalledAgent
    settings: Mapping[str, str]
    disk: Drive
    start: BootStart


def _prepare(disk: Drive, folder: Path, options: ProofOptions, access: Access) -> _Subject:
    """Inspect the copy, point its agent at this module's manager, and fetch the boot files."""
    with open_guest([disk], access, write=True) as opened:
        guest, mounted = opened.guest, opened.mounted
        access.control.step("preparing a throwaway copy")
        if guest.agent is None:
            raise PlanError("the guest has no injected agent", hint="inject it first")
        settings = parse_configuration(guest.agent.configuration)
        changes = {"MANAGER_URL": MANAGER_URL, "VM_ID": settings.get("VM_ID", DEFAULT_VM_ID)}
        configuration = guest.real_path(CONFIGURATION)
        status = mounted.filesystem.lstat(configuration)
        mounted.filesystem.write(
            configuration,
            update_configuration(guest.agent.configuration, changes),
            Attributes(mode=status.mode if status else None),
        )
        sectors = disk_sectors(opened.appliance)
        start = find_start(
            opened,
            folder,
            kernel=options.kernel,
            initrd=options.initrd,
            firmware=options.firmware,
        )
        if mounted.snapshot:
            finish_snapshot(opened.appliance, mounted.snapshot)
    return _Subject(
        guest=guest,
        agent=guest.agent,
        settings={**settings, **changes},
        disk=replace(disk, sectors=sectors),
        start=start,
    )


def _boot_and_check(
    path: Path, subject: _Subject, options: ProofOptions, control: Control
) -> ProofReport:
    begun = time.monotonic()
    deadline = begun + options.timeout
    port = port_in(subject.settings)
    with (
        ReportListener() as listener,
        boot(
            subject.disk,
            source=subject.start.source,
            agent_port=port,
            manager=listener.address,
            control=control,
            arch=subject.start.arch,
            seconds=options.timeout + 60,
        ) as machine,
    ):
        control.step("booting the guest")
        health = wait_for_http(f"{machine.agent_url}/health", deadline, machine)
        seconds = time.monotonic() - begun
        control.step("checking the agent")
        with _with_console(machine):
            checks = [_check_health(health, subject.agent)]
            first = wait_for_http(f"{machine.agent_url}/metrics", deadline, machine)
            time.sleep(READING_GAP)
            second = wait_for_http(f"{machine.agent_url}/metrics", deadline, machine)
            checks.append(_check_metrics(first, second))
            information = wait_for_http(f"{machine.agent_url}/info", deadline, machine)
            checks.append(_check_init(information, subject.guest))
            control.step("waiting for the IP report")
            reports = listener.wait_for_reports(1, deadline=deadline, check=machine.check)
            # read again: the agent may not have seen its new address before
            information = wait_for_http(f"{machine.agent_url}/info", deadline, machine)
            guest_ip, sentence = _check_report(reports, subject, information)
            checks.append(sentence)
    return ProofReport(
        image=path,
        init=str(subject.guest.init.system),
        booted_by=subject.start.name,
        checks=(f"booted by its {subject.start.name}", *checks),
        health=health,
        metrics=second,
        information=information,
        guest_ip=guest_ip,
        seconds=seconds,
    )


@contextlib.contextmanager
def _with_console(machine: Machine) -> Iterator[None]:
    """Add the console's last lines to a failed check."""
    try:
        yield
    except ProofError as exc:
        if not exc.console:
            exc.console = tuple(machine.console_tail(40))
        raise


def _check_health(health: Mapping[str, Any], agent: InstalledAgent) -> str:
    if health.get("status") != "healthy" or health.get("version") != agent.version:
        raise ProofError(
            f"/health does not answer like agent {agent.version}: {dict(health)!r:.300}"
        )
    if not _is_integer(health.get("timestamp")):
        raise ProofError(f"/health's timestamp is not an integer: {health.get('timestamp')!r:.100}")
    return f"/health answers: healthy, agent {agent.version}"


def _check_metrics(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    wrong = [fault for reading in (first, second) for fault in metric_faults(reading)]
    if not wrong and second["uptime_seconds"] <= first["uptime_seconds"]:
        wrong = [f"uptime_seconds does not increase: {second['uptime_seconds']}"]
    if wrong:
        raise ProofError(f"/metrics is wrong: {'; '.join(dict.fromkeys(wrong))}")
    return "/metrics has every key with plausible values, and they change between two readings"


def metric_faults(metrics: Mapping[str, Any]) -> list[str]:
    """Return the violations of the wire contract in an answer of ``/metrics``, as sentences."""
    faults = [
        f"{name} is not an integer: {metrics.get(name)!r:.60}"
        for name in INTEGERS
        if not _is_integer(metrics.get(name)) or metrics[name] < 0
    ]
    faults += [
        f"{name} is not a percentage: {metrics.get(name)!r:.60}"
        for name in PERCENTAGES
        if not isinstance(metrics.get(name), float) or not 0 <= metrics[name] <= 100  # noqa: PLR2004
    ]
    load, count = metrics.get("load_average"), metrics.get("process_count")
    if not isinstance(load, float) or load < 0:
        faults.append(f"load_average is not a number: {load!r:.60}")
    if not _is_integer(count) or not isinstance(count, int) or count < 1:
        faults.append(f"process_count is not a count: {count!r:.60}")
    if not faults:
        total, used = metrics["memory_total_kb"], metrics["memory_used_kb"]
        if not 0 < used < total or used + metrics["memory_available_kb"] != total:
            faults.append("memory_used_kb and memory_available_kb do not add up to memory_total_kb")
    return faults


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_init(information: Mapping[str, Any], guest: GuestInfo) -> str:
    running = information.get("init")
    if not isinstance(running, dict):
        raise ProofError("/info does not name the agent's init system")
    system = str(guest.init.system)
    fault = definition_of(system).check_supervisor(running, guest.init)
    if fault:
        raise ProofError(f"the agent does not run under {system}: {fault}")
    return f"the agent runs under {system}, process 1 is {running.get('pid1')}"


def _check_report(
    reports: tuple[Report, ...], subject: _Subject, information: Mapping[str, Any]
) -> tuple[str, str]:
    if not reports:
        raise ProofError("no IP report arrived at the manager")
    report = reports[0]
    wanted = f"/v1/vms/{subject.settings['VM_ID']}/guest-ip"
    body = report.body if isinstance(report.body, dict) else {}
    if (report.method, report.path) != ("POST", wanted):
        raise ProofError(f"the agent sent {report.method} {report.path}, not POST {wanted}")
    try:
        address = ipaddress.ip_address(str(body.get("guest_ip")))
    except ValueError as exc:
        raise ProofError(f"the reported address is invalid: {report.body!r:.200}") from exc
    if address.is_loopback or str(address) not in information.get("addresses", []):
        raise ProofError(f"the reported address {address} is not one of the guest's own")
    return str(address), f"the IP report arrived at the manager: {address}"
