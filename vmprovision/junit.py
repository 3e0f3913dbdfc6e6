"""Write results as JUnit XML, the format that CI systems show.

There is no standard. The elements and attributes are those of Ant's JUnit task, which
Jenkins, GitLab and others read. A failure is work that could not be done; an error is a
fault of vmprovision itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from vmprovision.errors import VmprovisionError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmprovision.reports import BatchReport, JobResult

INJECT = "vmprovision inject"


@dataclass(frozen=True, slots=True, kw_only=True)
class TestCase:
    """One result.

    Attributes:
        group: a dotted name of its group.
        name: the image or file.
        output: the text to show for a success.
        error: why it failed.
        skipped: why it was not done.
    """

    group: str
    name: str
    seconds: float
    output: str = ""
    error: VmprovisionError | None = None
    skipped: str = ""


def junit_xml(report: BatchReport, *, seconds: float) -> bytes:
    """Return the results of a batch as a document, in UTF-8.

    Args:
        report: the results.
        seconds: how long the whole batch took.
    """
    return junit_document(INJECT, [_case_of(result) for result in report.results], seconds=seconds)


def junit_document(name: str, cases: Sequence[TestCase], *, seconds: float) -> bytes:
    """Return results as a document, in UTF-8.

    Args:
        name: the command's name.
        cases: the results.
        seconds: the total duration.
    """
    errors = [case.error for case in cases if case.error]
    faults = sum(type(error) is VmprovisionError for error in errors)
    counts = {
        "tests": str(len(cases)),
        "failures": str(len(errors) - faults),
        "errors": str(faults),
        "skipped": str(sum(bool(case.skipped) for case in cases)),
        "time": f"{seconds:.3f}",
    }
    suites = ET.Element("testsuites", {"name": name, **counts})
    suite = ET.SubElement(suites, "testsuite", {"name": name, **counts})
    for case in cases:
        _add(suite, case)
    ET.indent(suites)
    document: bytes = ET.tostring(suites, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _add(suite: ET.Element, case: TestCase) -> None:
    element = ET.SubElement(
        suite,
        "testcase",
        {
            "classname": case.group,
            "name": printable(case.name),
            "time": f"{case.seconds:.3f}",
        },
    )
    if error := case.error:
        kind = "error" if type(error) is VmprovisionError else "failure"
        about = {"type": type(error).__name__, "message": error.message}
        failure = ET.SubElement(element, kind, about)
        failure.text = f"next: {error.hint}" if error.hint else None
    elif case.skipped:
        ET.SubElement(element, "skipped", {"message": case.skipped})
    elif case.output:
        ET.SubElement(element, "system-out").text = case.output


def _case_of(result: JobResult) -> TestCase:
    skipped = {"cancelled": "cancelled", "skipped": "done by an earlier run"}
    report = result.report
    return TestCase(
        group="vmprovision.inject",
        name=str(result.image),
        seconds=result.seconds,
        output=f"{result.outcome}: {len(report.changed)} paths changed, {report.verified} verified"
        if report
        else "",
        error=result.error if result.outcome == "failed" else None,
        skipped=skipped.get(result.outcome, ""),
    )
