"""What all init systems have in common: definition, variants, and the check of the supervisor.

Each init system's module states its peculiarities in a ``Definition``. The verdict, the
caller's override and the check of a running agent are here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from vmprovision.guest.facts import Confidence, InitSystem, InitVerdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import PurePosixPath

    from vmprovision.changes.operations import Operation
    from vmprovision.filesystem.protocol import GuestReader
    from vmprovision.guest.facts import Pid1
    from vmprovision.initsystem.markers import Markers
    from vmprovision.initsystem.rendering import Service

COMM_LENGTH = 15  # the kernel keeps so many characters of a process's name (proc_pid_comm(5))
UNIT = "/guest-agent.service"  # the end of the control group of the agent's unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervisor:
    """What the running agent's ``/info`` shows while an init system supervises it.

    Attributes:
        pid1: the name of process 1, or None for any name but ``systemd``.
        allows_systemd: whether process 1 may be systemd, which then only starts the supervisor.
        parents: process numbers and names, one of which is the parent's; empty for any parent.
        in_unit: whether the agent runs in the control group of its systemd unit.
    """

    pid1: str | None = None
    allows_systemd: bool = False
    parents: tuple[int | str, ...] = ()
    in_unit: bool = False

    def check(self, running: Mapping[str, Any]) -> str | None:
        """Return evidence that another supervisor runs the agent, or None.

        Args:
            running: ``init`` of ``/info``. It comes from the guest, so any value may be
                missing or of another type.
        """
        pid1, parent, cgroup = (running.get(key) for key in ("pid1", "parent", "cgroup"))
        if pid1 != self.pid1 if self.pid1 else pid1 == "systemd" and not self.allows_systemd:
            return f"process 1 is {pid1!r:.80}"
        if str(cgroup).endswith(UNIT) != self.in_unit:
            return f"its control group is {cgroup!r:.200}"
        if self.parents and not self._is_parent(parent):
            wanted = " or ".join(
                f"process {each}" if each == 1 else str(each) for each in self.parents
            )
            return f"its parent is {parent!r:.120}, not {wanted}"
        return None

    def _is_parent(self, parent: object) -> bool:
        if not isinstance(parent, dict):
            return False
        pid, comm = parent.get("pid"), parent.get("comm")
        if type(pid) is int and pid in self.parents:  # JSON's true is not a process number
            return True
        names = [each[:COMM_LENGTH] for each in self.parents if isinstance(each, str)]
        return isinstance(comm, str) and comm[:COMM_LENGTH] in names


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """How ``guest-agent install`` finds a variant in a running system, and starts the service.

    Attributes:
        processes: what process 1 may be: ``busybox``, ``upstart``, or another program's name;
            empty for any.
        files: groups of paths; at least one path of each group must exist.  A block of lines
            goes into the existing path of the last group.
        start: commands that start the service, with words separated by spaces, run without
            a shell.  A command may be missing or fail, because the agent is queried
            afterwards.  If empty, the block is run as a script.
        stop: commands that stop the service.  If empty, the agent's processes are ended.
        afterwards: commands to run once the files are gone.
    """

    processes: tuple[str, ...] = ()
    files: tuple[tuple[str, ...], ...] = ()
    start: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    afterwards: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way in which an init system runs the service.

    Attributes:
        dialect: its name, as ``InitVerdict.dialect`` has it; empty for the only or usual one.
        hook: the file through which boot starts commands, if there is no place for services.
        supervisor: how a running agent shows who supervises it.
        live: how the agent installs itself in a running system, or None if it cannot.
    """

    dialect: str = ""
    hook: PurePosixPath | None = None
    supervisor: Supervisor = Supervisor()
    live: Live | None = None


class Evidence(NamedTuple):
    """The evidence that an init system runs the guest's services.

    Attributes:
        sentences: the evidence for a person.
        confidence: how certain it is.
        pid1: process 1, if it differs from the result of ``find_pid1``.
    """

    sentences: tuple[str, ...]
    confidence: Confidence = "certain"
    pid1: str | None = None


def _unchanged(_reader: GuestReader, _pid1: Pid1, verdict: InitVerdict) -> InitVerdict:
    return verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """One init system.

    Attributes:
        name: as ``--init`` takes it.
        variants: each way in which it runs the service, the usual one first.
        markers: the files that it leaves in a guest.
        detect: returns the evidence that it runs the guest's services, or None.
        service_operations: returns the operations for the service, the enabling one last.
            Pure.
        complete: adds details of this guest to a verdict, such as dialect and hook.  Raises
            InspectionError if the guest has no place for the service.
    """

    name: InitSystem
    variants: tuple[Variant, ...]
    markers: Markers
    detect: Callable[[GuestReader, Pid1], Evidence | None]
    service_operations: Callable[[Service, InitVerdict], list[Operation]]
    complete: Callable[[GuestReader, Pid1, InitVerdict], InitVerdict] = _unchanged

    def judge(self, reader: GuestReader, pid1: Pid1) -> InitVerdict | None:
        """Return the verdict if this init system runs the guest's services, else None."""
        evidence = self.detect(reader, pid1)
        if evidence is None:
            return None
        verdict = InitVerdict(
            system=self.name,
            pid1=evidence.pid1 or pid1.program,
            confidence=evidence.confidence,
            evidence=(*pid1.evidence, *evidence.sentences),
        )
        return self.complete(reader, pid1, verdict)

    def override(self, reader: GuestReader, pid1: Pid1) -> InitVerdict:
        """Return the verdict for a caller who states this init system.

        Raises:
            InspectionError: the guest has no place for the service.
        """
        verdict = InitVerdict(
            system=self.name,
            pid1=pid1.program,
            confidence="told",
            evidence=(f"the caller stated {self.name}", *pid1.evidence),
        )
        return replace(self.complete(reader, pid1, verdict), obstacle="")

    def without_guest(self) -> list[InitVerdict]:
        """Return one verdict for each variant, without any detail of a guest."""
        return [
            InitVerdict(
                system=self.name,
                pid1=self.name,
                confidence="told",
                evidence=(),
                hook=variant.hook,
                dialect=variant.dialect,
            )
            for variant in self.variants
        ]

    def check_supervisor(self, running: Mapping[str, Any], verdict: InitVerdict) -> str | None:
        """Return evidence that a running agent is not under this init system, or None.

        Args:
            running: ``init`` of the agent's ``/info``.
            verdict: the verdict of the inspection.
        """
        usual = self.variants[0]
        variant = next((v for v in self.variants if v.dialect == verdict.dialect), usual)
        return variant.supervisor.check(running)
