"""Print reports as text for a person."""

from __future__ import annotations

import collections
import json
import time
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import (
    EditBlock,
    MakeDirectory,
    Operation,
    Remove,
    Symlink,
    WriteFile,
)
from vmprovision.errors import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmprovision.appliance.snapshot.store import SavedAppliance
    from vmprovision.cli.console import Console
    from vmprovision.doctor import Finding
    from vmprovision.guest.facts import GuestInfo, InitVerdict
    from vmprovision.proof.prove import ProofReport
    from vmprovision.reports import (
        BatchReport,
        ChangeReport,
        JobResult,
        PlanReport,
        VerifyReport,
    )
    from vmprovision.runtime.store import Runtime
    from vmprovision.seed.make import SeedReport


def show_guest(console: Console, guest: GuestInfo) -> None:
    """Print all facts about a guest, one per line, with the evidence indented."""
    distribution = guest.distribution
    _row(console, "distro", distribution.id)
    _row(console, "product name", distribution.product_name)
    _row(console, "version", distribution.version or "-")
    _row(console, "arch", f"{guest.arch} ({', '.join(filter(None, (guest.abi, guest.libc)))})")
    _show_verdict(console, guest.init)
    pythons = [
        f"{i.path} ({i.version or 'version unknown'}{f', {i.fault}' if i.fault else ''})"
        for i in guest.interpreters
    ]
    _row(console, "interpreters", ", ".join(pythons) or "none")
    selinux = guest.selinux
    _row(console, "selinux", f"{selinux.mode} ({selinux.policy})" if selinux else "none")
    if selinux and selinux.obstacle:
        console.print(f"{'':<14}- {printable(selinux.obstacle)}")
    own = guest.usable_python
    _row(console, "runtime", f"the guest's {own.path}" if own else "bundled: no Python is usable")
    for each in guest.first_boot:
        _row(console, "first boot", each.program)
        if each.obstacle:
            console.print(f"{'':<14}- {printable(each.obstacle)}")
    brought = ", with a runtime" if guest.has_runtime else ""
    _row(console, "agent", f"version {guest.agent.version}{brought}" if guest.agent else "none")
    for note in guest.notes:
        _row(console, "note", note)


def _show_verdict(console: Console, verdict: InitVerdict) -> None:
    """Print the init system and its evidence, and with ``--explain`` the evidence for others."""
    unknown = f"unknown: process 1 is {verdict.pid1}"
    _row(console, "init", f"{verdict.system} ({verdict.confidence})" if verdict.system else unknown)
    for sentence in (*verdict.evidence, verdict.doubt):
        if sentence:
            console.print(f"{'':<14}- {printable(sentence)}")
    for hint in verdict.hints or ():
        line = f"{hint.speaks_for}: {hint.seen}; {hint.outcome}"
        agrees = hint.speaks_for == verdict.system and hint.kind != "boot"
        mark = "for" if agrees else "against" if verdict.system else "seen"
        console.print(f"{'':<14}{mark:<8}{printable(line)}")


def show_plan(console: Console, report: PlanReport) -> None:
    """Print the operations in order; mark those that are already satisfied."""
    _show_target(console, report.guest)
    for planned in report.operations:
        mark = "done " if planned.satisfied else "to do"
        console.print(f"{mark}  {printable(_sentence(planned.operation))}")
    left = sum(not planned.satisfied for planned in report.operations)
    console.print(f"{left} of {len(report.operations)} operations to do; nothing was written")
    _show_notes(console, report.notes)


def show_changes(console: Console, report: ChangeReport, *, done: str) -> None:
    """Print what an injection or a removal wrote."""
    _show_target(console, report.guest)
    for path in report.changed:
        console.print(f"changed  {printable(str(path))}")
    console.print(f"{report.image}: {_summary(report, done)}")
    _show_notes(console, report.notes)


def show_seed(console: Console, report: SeedReport) -> None:
    """Print the paths that a seed writes in its guest, or the strings that it consists of."""
    if report.output is None:
        for string in report.strings:
            console.print(string)
        return
    if report.guest is not None:
        _show_target(console, report.guest)
    for path in report.paths:
        console.print(f"makes  {printable(path)}")
    console.print(f"{report.output}: {_seed_summary(report)}; no image was written to")
    _show_notes(console, report.notes)


def _seed_summary(report: SeedReport) -> str:
    if report.strings:
        return f"{len(report.strings)} strings for {report.kind}"
    return f"agent {report.agent_version} for {report.kind}: {len(report.paths)} paths to make"


def show_batch(console: Console, aside: Console, report: BatchReport) -> None:
    """Print how every image of a batch ended, one per line; next steps and totals go aside."""
    for result in report.results:
        console.print(f"{printable(str(result.image))}: {_ending(result)}")
    hints = [result.error.hint for result in report.results if result.error]
    for hint in dict.fromkeys(hint for hint in hints if hint):
        aside.print(f"  next: {hint}")
    notes = collections.Counter(
        note for result in report.results if result.report for note in result.report.notes
    )
    for note, number in notes.items():
        aside.print(f"  note ({number} of {len(report.results)}): {printable(note)}")
    counts = report.as_json()["counts"]
    totals = ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number)
    aside.print(f"vmprovision: {totals or 'no images'}")


def _ending(result: JobResult) -> str:
    if result.report is not None:
        return _summary(result.report, "injected")
    if result.outcome == "failed" and result.error is not None:
        return f"failed ({result.exit_code}): {result.error.sentence}"
    return "skipped: done by an earlier run" if result.outcome == "skipped" else result.outcome


def _summary(report: ChangeReport, done: str) -> str:
    if report.changed:
        version = f"agent {report.agent_version} " if report.agent_version else "agent "
        summary = f"{version}{done}: {len(report.changed)} paths changed"
    else:
        summary = "nothing to do: the guest is already as wanted"
    return f"{summary}, {report.verified} verified"


def show_verification(console: Console, report: VerifyReport) -> None:
    """Print every mismatch, or that there is none."""
    for mismatch in report.mismatches:
        console.print(f"differs  {printable(mismatch)}")
    outcome = f"{len(report.mismatches)} mismatches" if report.mismatches else "all as it should be"
    console.print(
        f"{report.image}: agent {report.agent_version} under {report.init}: "
        f"{report.checked} paths checked, {outcome}"
    )


def show_proof(console: Console, report: ProofReport) -> None:
    """Print what the booted guest answered."""
    for check in report.checks:
        console.print(f"ok  {printable(check)}")
    _show_answer(console, "health", report.health)
    flat = {name: value for name, value in report.metrics.items() if _is_flat(value)}
    _show_answer(console, "metrics", flat)
    _row(console, "reported IP", report.guest_ip)
    console.print(f"{report.image}: proven by a boot, agent up after {report.seconds:.0f} s")


def show_runtimes(console: Console, runtimes: Sequence[Runtime]) -> None:
    """Print the available runtimes, one per line."""
    for runtime in runtimes:
        console.print(
            f"{runtime.architecture:<10}MicroPython {runtime.micropython}, {runtime.size} bytes, "
            f"{runtime.compiler}, {runtime.path}"
        )
    if not runtimes:
        console.print("none: `vmprovision runtime build` builds this host's")


def show_appliance(console: Console, saved: SavedAppliance | None) -> None:
    """Print where the saved appliance is, or that there is none."""
    if saved is None:
        console.print("none yet: the first command that opens an image saves one")
        return
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(saved.made))
    _row(console, "folder", str(saved.folder))
    _row(console, "size", f"{saved.size >> 20} MiB")
    _row(console, "saved", f"{made}, for libguestfs {saved.made_of['libguestfs']}")
    _row(console, "restored by", f"{saved.made_of['qemu'][0]}, {saved.made_of['accelerator']}")


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Print every finding, with the command that fixes it."""
    for finding in findings:
        mark = "ok  " if finding.ok else "FAIL" if finding.needed else "warn"
        console.print(f"{mark}  {finding.subject}: {printable(finding.detail)}")
        if finding.fix:
            console.print(f"      fix: {finding.fix}")


def show_service(console: Console, operations: Sequence[tuple[Operation, bytes]]) -> None:
    """Print the files of a service, each below its guest path."""
    for operation, content in operations:
        mode = f" (mode {operation.mode:04o})" if isinstance(operation, WriteFile) else ""
        console.print(f"### {operation.path}{mode}")
        console.print(content.decode(), end="\n")


def _show_answer(console: Console, name: str, answer: dict[str, Any]) -> None:
    _row(console, name, json.dumps(answer))


def _is_flat(value: object) -> bool:
    """Return whether a metric is a single value, not a table of processors, disks or interfaces."""
    return not isinstance(value, dict | list)


def _show_target(console: Console, guest: GuestInfo) -> None:
    console.print(
        f"{guest.distribution.product_name}, {guest.arch}, init {guest.init.system} "
        f"({guest.init.confidence})"
    )


def _show_notes(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"note: {printable(note)}")


def _row(console: Console, name: str, value: str) -> None:
    console.print(f"{name:<14}{printable(value)}")


def _sentence(operation: Operation) -> str:
    sentence = _statement(operation)
    if not isinstance(operation, Remove) and operation.label is not None:
        sentence += f", label {operation.label}"
    return sentence


def _statement(operation: Operation) -> str:
    if isinstance(operation, MakeDirectory):
        return f"directory {operation.path}, mode {operation.mode:04o}"
    if isinstance(operation, WriteFile):
        return f"file {operation.path}, {len(operation.content)} bytes, mode {operation.mode:04o}"
    if isinstance(operation, Symlink):
        return f"link {operation.path} -> {operation.target}"
    if isinstance(operation, EditBlock):
        return f"lines of {operation.name} in {operation.path}"
    return f"nothing at {operation.path}"
