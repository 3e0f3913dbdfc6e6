"""Describe the content of a baked image as a CycloneDX 1.6 document.

Components are the packages in the guest's own databases, each with its package URL, and
the agent with every file that came with it.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

from vmprovision import __version__
from vmprovision.changes.conditions import FileCondition
from vmprovision.changes.receipt import AGENT, RUNTIME
from vmprovision.runtime.store import list_runtimes

if TYPE_CHECKING:
    from datetime import datetime

    from vmprovision.guest.facts import Distribution
    from vmprovision.inspection.packages import Package
    from vmprovision.reports import ContentsReport

# The package URL's namespace if the guest has no os-release(5).
VENDORS = {"deb": "debian", "apk": "alpine", "rpm": "redhat"}


def make_sbom(contents: ContentsReport, *, name: str, key: str, moment: datetime) -> bytes:
    """Return the document as JSON.

    Args:
        contents: the guest's agent and packages.
        name: the bake's name.
        key: the bake's key, from which the document's serial number is derived.
        moment: when the bake was made.
    """
    guest = contents.guest.distribution
    system = Component(
        name=guest.id,
        version=guest.version or None,
        type=ComponentType.OPERATING_SYSTEM,
        bom_ref=f"image:{name}",
        description=guest.product_name,
    )
    gaps = [Property(name="vmprovision:gap", value=gap) for gap in contents.packages.gaps]
    databases = [
        Property(name="vmprovision:package-database", value=str(path))
        for path in contents.packages.databases
    ]
    if not databases and not gaps:
        gaps = [Property(name="vmprovision:gap", value="the guest has no package database")]
    agent = _agent(contents)
    packages = [_package(package, guest) for package in contents.packages.packages]
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"urn:vmprovision:bake:{key}"),
        components=[agent, *packages],
        metadata=BomMetaData(
            timestamp=moment,
            component=system,
            tools=ToolRepository(
                components=[
                    Component(
                        name="vmprovision", version=__version__, type=ComponentType.APPLICATION
                    )
                ]
            ),
            properties=[*databases, *gaps],
        ),
    )
    bom.register_dependency(system, [agent, *packages])
    outputter = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6)
    text: str = outputter.output_as_string(indent=1)
    return text.encode() + b"\n"


def _package(package: Package, guest: Distribution) -> Component:
    vendor = guest.id if guest.id != "unknown" else VENDORS[package.format]
    qualifiers = {
        "arch": package.architecture,
        "distro": f"{vendor}-{guest.version}" if guest.version else "",
        "epoch": package.epoch,
        # the form that vulnerability scanners look up
        "upstream": package.source if package.source != package.name else "",
    }
    purl = PackageURL(
        type=package.format,
        namespace=vendor,
        name=package.name,
        version=package.version,
        qualifiers={key: value for key, value in qualifiers.items() if value},
    )
    return Component(
        name=package.name,
        version=package.version,
        type=ComponentType.LIBRARY,
        bom_ref=purl.to_string(),
        purl=purl,
        licenses=[DisjunctiveLicense(name=package.licence)] if package.licence else (),
    )


def _agent(contents: ContentsReport) -> Component:
    """Return the agent as a component that contains the files that came with it."""
    conditions = [entry.condition for entry in contents.receipt.entries]
    files = [each for each in conditions if isinstance(each, FileCondition) and each.sha256]
    own = next((each for each in files if each.path == AGENT), None)
    return Component(
        name="guest-agent",
        version=contents.receipt.agent_version,
        type=ComponentType.APPLICATION,
        bom_ref="guest-agent",
        hashes=_hashes(own) if own else (),
        properties=[Property(name="vmprovision:path", value=str(AGENT))],
        components=[_file(each) for each in files if each.path != AGENT],
    )


def _file(condition: FileCondition) -> Component:
    """Return a file as a component; the bundled runtime has MicroPython's version."""
    versions = {each.sha256: each.micropython for each in list_runtimes()}
    version = versions.get(condition.sha256 or "") if condition.path == RUNTIME else None
    return Component(
        name="micropython" if version else str(condition.path),
        version=version,
        type=ComponentType.APPLICATION if condition.path == RUNTIME else ComponentType.FILE,
        bom_ref=f"file:{condition.path}",
        hashes=_hashes(condition),
        properties=[Property(name="vmprovision:path", value=str(condition.path))],
    )


def _hashes(condition: FileCondition) -> list[HashType]:
    return [HashType(alg=HashAlgorithm.SHA_256, content=str(condition.sha256))]
