"""The results of a batch as JUnit XML, the form that CI systems show.

There is no standard: the elements and attributes are those of Ant's JUnit task, which
Jenkins, GitLab and others read.  A failure is an image that could not be injected; an
error is a fault of vmprovision itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from vmprovision.errors import printable

if TYPE_CHECKING:
    from vmprovision.reports import BatchReport, JobResult

NAME = "vmprovision inject"


def junit_xml(report: BatchReport, *, seconds: float) -> bytes:
    """Return the document, encoded as UTF-8.

    Args:
        report: the results.
        seconds: how long the whole batch took.
    """
    faults = sum(result.is_fault for result in report.results)
    counts = {
        "tests": str(len(report.results)),
        "failures": str(report.count("failed") - faults),
        "errors": str(faults),
        "skipped": str(report.count("skipped", "cancelled")),
        "time": f"{seconds:.3f}",
    }
    suites = ET.Element("testsuites", {"name": NAME, **counts})
    suite = ET.SubElement(suites, "testsuite", {"name": NAME, **counts})
    for result in report.results:
        _add(suite, result)
    ET.indent(suites)
    document: bytes = ET.tostring(suites, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _add(suite: ET.Element, result: JobResult) -> None:
    case = ET.SubElement(
        suite,
        "testcase",
        {
            "classname": "vmprovision.inject",
            "name": printable(str(result.image)),
            "time": f"{result.seconds:.3f}",
        },
    )
    error = result.error
    if result.outcome == "failed" and error is not None:
        kind = "error" if result.is_fault else "failure"
        element = ET.SubElement(
            case, kind, {"type": type(error).__name__, "message": error.message}
        )
        element.text = f"next: {error.hint}" if error.hint else None
    elif result.outcome == "cancelled":
        ET.SubElement(case, "skipped", {"message": "cancelled"})
    elif result.outcome == "skipped":
        ET.SubElement(case, "skipped", {"message": "done by an earlier run"})
    elif result.report is not None:
        ET.SubElement(case, "system-out").text = (
            f"{result.outcome}: {len(result.report.changed)} paths changed, "
            f"{result.report.verified} verified"
        )
