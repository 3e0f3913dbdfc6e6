"""The facts about a guest, each with its evidence."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from vmprovision.changes.receipt import RUNTIME
from vmprovision.guest.configuration import parse_configuration
from vmprovision.guest.names import INIT_SYSTEMS as INIT_SYSTEMS  # noqa: PLC0414 -- for importers
from vmprovision.guest.names import InitSystem as InitSystem  # noqa: PLC0414, TC001 -- likewise
from vmprovision.mounts import innermost

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.changes.receipt import Receipt
    from vmprovision.mounts import HiddenMount
    from vmprovision.selinux.policy import SELinuxPolicy

Confidence = Literal["certain", "likely", "told", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """The guest's distribution.

    Attributes:
        id: os-release(5)'s ID, or the name that its release file stands for;
            ``unknown``.
        product_name: the name for a person.
        version: as the distribution writes it (``14.04``); empty if it has none.
    """

    id: str
    product_name: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """A filesystem that the guest's kernel checks against a hash: any change makes it unreadable.

    Attributes:
        place: its mountpoint.
        origin: the evidence, as a sentence.
    """

    place: PurePosixPath
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pid1:
    """The program of process 1.

    Attributes:
        program: ``systemd``, ``busybox``, ``script``, …; ``unknown`` for a program that is
            not identified, ``none`` if there is no program.
        path: its real path, or None if there is none.
        evidence: the evidence, in sentences.
        is_seen: False if the file is missing or not executable, so that only its name is known.
        doubt: the contradiction in the guest, as a sentence; empty if there is none.
        offered: programs of the boot menu's other entries, each with a sentence that names
            its entry.
        units: the units that the boot menu names for systemd; None means ``default.target``.
        seals: the filesystems that the boot menu seals.
    """

    program: str
    path: PurePosixPath | None
    evidence: tuple[str, ...]
    is_seen: bool = True
    doubt: str = ""
    offered: tuple[tuple[str, str], ...] = ()
    units: tuple[str | None, ...] = ()
    seals: tuple[Seal, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """Evidence in the guest for an init system, decisive or not.

    Attributes:
        speaks_for: the init system, or the program of process 1.
        kind: ``program`` (it could be started), ``files`` (it would read them), ``boot``
            (an entry of the boot menu starts it).
        seen: the evidence, as a sentence.
        outcome: why it counts or not, as a sentence.
    """

    speaks_for: str
    kind: Literal["program", "files", "boot"]
    seen: str
    outcome: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InitVerdict:
    """The init system that runs the guest's services, with the evidence.

    Attributes:
        system: the init system, or None if it is unknown or not supported.
        pid1: the program that the kernel starts: ``systemd``, ``busybox``,
            ``sysvinit``, …
        confidence: ``certain`` (the file says so), ``likely`` (a rule of thumb),
            ``told`` (stated by the caller), ``unknown`` (there is no system).
        evidence: sentences for a person.
        hook: the file through which boot starts commands, for init systems that have no
            services of their own. For systemd, the directory of links, if it is not the
            usual one.
        dialect: the variant of the init system, if it has several; they are listed in
            the init system's module.
        doubt: the contradiction because of which there is no system.
        hints: other evidence for this or another init system; None if it was not
            requested.
        preset: for systemd, the file name with which the agent's preset wins.
        waits_for: for dinit, the guest's services that must be up before the agent.
        obstacle: why the init system would not start a service in this guest, as a
            sentence; empty if it would.
    """

    system: InitSystem | None
    pid1: str
    confidence: Confidence
    evidence: tuple[str, ...]
    hook: PurePosixPath | None = None
    dialect: str = ""
    doubt: str = ""
    hints: tuple[Hint, ...] | None = None
    preset: str = ""
    waits_for: tuple[str, ...] = ()
    obstacle: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """A Python in the guest.

    Attributes:
        version: the version in its files (``3.11``), or None.
        fault: why its files cannot run the agent, as the end of a sentence; empty if they can.
    """

    path: PurePosixPath
    version: str | None
    implementation: Literal["cpython", "micropython", "pypy"] = "cpython"
    fault: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether it can run the agent, which needs CPython 2.6, 2.7, or 3.2 and later."""
        if self.fault or self.implementation == "micropython":
            return False  # an ordinary MicroPython lacks the modules of the bundled runtime
        number = tuple(int(part) for part in re.findall(r"\d+", self.version or "3.99"))
        return (2, 6) <= number < (3, 0) or number >= (3, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstBoot:
    """A program that sets the guest up at its first boot, from data of its host.

    Attributes:
        name: the program's name.
        obstacle: why it would ignore a seed, as a sentence; empty if it would not.
    """

    program: Literal["cloud-init", "ignition"]
    obstacle: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel in the guest's ``/boot``, with its initrd."""

    path: PurePosixPath
    initrd: PurePosixPath | None
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledAgent:
    """The agent that the guest already has, by its receipt.

    Attributes:
        configuration: the content of ``/etc/guest-agent.conf``; empty if it is gone.
        unfinished: whether an injection or removal was interrupted. The receipt then lists
            all that it may have changed.
        notes: sentences for a person about the receipt.
    """

    version: str
    receipt: Receipt
    configuration: bytes
    unfinished: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestInfo:
    """All facts about a guest that a plan depends on.

    Attributes:
        arch: the userland's architecture (``x86_64``, ``aarch64``, …), by its ELF
            files; ``unknown``.
        libc: ``glibc``, ``musl`` or ``unknown``.
        abi: the userland's calling convention, if its architecture has several:
            ``eabihf`` or ``eabi``, ``x32``, ``lp64d``, ``elfv2``.
        links: the real path of each directory that is, or is below, a link.
        circles: directories that lead through a circle of links.
        mountpoints: the device in the appliance of each mounted guest directory.
        hidden: the guest's mounts over directories that matter which are not mounted
            here.
        seals: the filesystems that must not be changed.
        agent: the installed agent, or None.
        notes: sentences for a person.
    """

    distribution: Distribution
    arch: str
    libc: Literal["glibc", "musl", "unknown"]
    init: InitVerdict
    abi: str = ""
    interpreters: tuple[Interpreter, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    first_boot: tuple[FirstBoot, ...] = ()
    selinux: SELinuxPolicy | None = None
    agent: InstalledAgent | None = None
    links: Mapping[PurePosixPath, PurePosixPath] = field(default_factory=dict)
    circles: frozenset[PurePosixPath] = frozenset()
    mountpoints: Mapping[str, str] = field(default_factory=dict)
    hidden: tuple[HiddenMount, ...] = ()
    seals: tuple[Seal, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def usable_python(self) -> Interpreter | None:
        """The guest's own Python that runs the agent: the first that its launcher finds."""
        return next((each for each in self.interpreters if each.is_usable), None)

    @property
    def unusable_pythons(self) -> str:
        """The faults of the guest's Pythons, for the end of a sentence; empty if none is known."""
        faults = [f"{each.path} {each.fault}" for each in self.interpreters if each.fault]
        return f" ({'; '.join(faults[:3])})" if faults else ""

    @property
    def has_runtime(self) -> bool:
        """Whether the installed agent brought a runtime with it."""
        path = self.real_path(RUNTIME)
        return self.agent is not None and self.agent.receipt.entry_for(path) is not None

    def real_path(self, path: PurePosixPath) -> PurePosixPath:
        """Return the real path in this guest, by following the longest parent that is a link."""
        for parent in path.parents:
            if parent in self.links:
                return self.links[parent] / path.relative_to(parent)
        return path

    def sealed_by(self, path: PurePosixPath) -> Seal | None:
        """Return the seal that a change of a path without links would break."""
        seals = {each.place: each for each in self.seals}
        mounted = [PurePosixPath(each) for each in self.mountpoints]
        return seals.get(innermost(path, [*seals, *mounted]))

    def hidden_by(self, path: PurePosixPath) -> HiddenMount | None:
        """Return the mount that hides a path without links in the running guest."""
        hidden = {each.mount.place: each for each in self.hidden}
        mounted = [PurePosixPath(each) for each in self.mountpoints]
        return hidden.get(innermost(path, [*hidden, *mounted]))

    def as_json(self) -> dict[str, Any]:
        """Return the facts as ``vmprovision inspect --json`` prints them."""
        return {
            "distro": self.distribution.id,
            "product_name": self.distribution.product_name,
            "version": self.distribution.version,
            "arch": self.arch,
            "libc": self.libc,
            "abi": self.abi or None,
            "init": _verdict_as_json(self.init),
            "interpreters": [
                {
                    "path": str(interpreter.path),
                    "version": interpreter.version,
                    "implementation": interpreter.implementation,
                    "usable": interpreter.is_usable,
                    "fault": interpreter.fault or None,
                }
                for interpreter in self.interpreters
            ],
            "runtime": "guest" if self.usable_python else "bundled",
            "selinux": {
                "mode": self.selinux.mode,
                "policy": self.selinux.policy,
                "obstacle": self.selinux.obstacle or None,
            }
            if self.selinux
            else None,
            "kernels": [str(kernel.path) for kernel in self.kernels],
            "first_boot": [
                {"program": each.program, "obstacle": each.obstacle or None}
                for each in self.first_boot
            ],
            "mountpoints": dict(self.mountpoints),
            "agent": _agent_as_json(self.agent, self.has_runtime) if self.agent else None,
            "notes": list(self.notes),
        }


def _verdict_as_json(verdict: InitVerdict) -> dict[str, Any]:
    found: dict[str, Any] = {
        "system": verdict.system,
        "pid1": verdict.pid1,
        "confidence": verdict.confidence,
        "evidence": list(verdict.evidence),
        "hook": str(verdict.hook) if verdict.hook else None,
        "dialect": verdict.dialect or None,
        "doubt": verdict.doubt or None,
        "obstacle": verdict.obstacle or None,
    }
    if verdict.hints is not None:
        found["hints"] = [
            {
                "for": hint.speaks_for,
                "kind": hint.kind,
                "seen": hint.seen,
                "outcome": hint.outcome,
            }
            for hint in verdict.hints
        ]
    return found


def _agent_as_json(agent: InstalledAgent, has_runtime: bool) -> dict[str, Any]:  # noqa: FBT001 -- a fact
    settings = parse_configuration(agent.configuration)
    return {
        "version": agent.version,
        "init": agent.receipt.init,
        "unfinished": agent.unfinished,
        "runtime": "bundled" if has_runtime else "guest",
        "vm_id": settings.get("VM_ID"),
        "manager_url": settings.get("MANAGER_URL"),
        "port": settings.get("PORT"),
        "paths": [str(entry.condition.path) for entry in agent.receipt.entries],
    }
