"""Write the files beside the images that describe their content and origin.

These are ``sbom.cdx.json`` (CycloneDX), ``provenance.json`` (in-toto, SLSA),
``bake.json`` (plan, receipt, proof, versions), ``junit.xml``, and ``SHA256SUMS`` over
all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from vmprovision import __version__
from vmprovision.bake.files import hash_file, write_sums
from vmprovision.bake.sbom import make_sbom
from vmprovision.bake.schema import RESERVED
from vmprovision.bake.statement import make_statement
from vmprovision.bake.store import DOCUMENT, SCHEMA
from vmprovision.changes.receipt import serialise_receipt
from vmprovision.host.command import run
from vmprovision.junit import TestCase, junit_document

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from vmprovision.bake.loading import LoadedBakeFile
    from vmprovision.progress import Control
    from vmprovision.proof.prove import ProofReport
    from vmprovision.reports import ChangeReport, ContentsReport, PlanReport
    from vmprovision.runtime.archive import Archive

SBOM, STATEMENT, JUNIT = "sbom.cdx.json", "provenance.json", "junit.xml"
VERSION_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bake:
    """The facts about a bake whose images are written.

    Attributes:
        key: the hash of all its inputs.
        source_sha256: the hash of the source image.
        begun: when it began.
        seconds: the duration of each step.
        mode: the images' permission bits.
    """

    loaded: LoadedBakeFile
    key: str
    source_sha256: str
    archive: Archive
    planned: PlanReport
    changed: ChangeReport
    contents: ContentsReport
    proof: ProofReport | None
    begun: datetime
    seconds: Mapping[str, float]
    mode: int


def describe_bake(bake: Bake, folder: Path, control: Control) -> None:
    """Write the descriptions into the folder of the images."""
    control.step("describing the image")
    moment = _moment()
    images = _image_files(bake, folder, control)
    sbom = make_sbom(bake.contents, name=bake.loaded.name, key=bake.key, moment=moment)
    (folder / SBOM).write_bytes(sbom)
    statement = make_statement(
        images,
        _materials(bake),
        parameters=bake.loaded.bake.model_dump(exclude_none=True),
        key=bake.key,
        begun=bake.begun,
        ended=moment,
    )
    (folder / STATEMENT).write_bytes(statement)
    document = json.dumps(_document(bake, images), indent=1, sort_keys=True)
    (folder / DOCUMENT).write_text(document + "\n", encoding="utf-8")
    (folder / JUNIT).write_bytes(_junit(bake))
    write_sums(folder, control)
    for path in [folder, *folder.rglob("*")]:
        described = path.parent == folder and path.name in RESERVED
        path.chmod(0o755 if path.is_dir() else 0o644 if described else bake.mode)


def _moment() -> datetime:
    """Return the time of the bake, or SOURCE_DATE_EPOCH if that is set."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if epoch.isdecimal():
        return datetime.fromtimestamp(int(epoch), timezone.utc)
    return datetime.now(timezone.utc).replace(microsecond=0)


def _image_files(bake: Bake, folder: Path, control: Control) -> dict[str, str]:
    """Return the hashes of the images; for an OCI layout, that of its index."""
    hashes = {}
    for output in bake.loaded.bake.output:
        name = output.file_name(bake.loaded.name)
        name = f"{name}/index.json" if output.format == "oci" else name
        hashes[name] = hash_file(folder / name, control)
    return hashes


def _materials(bake: Bake) -> dict[str, str]:
    source = bake.loaded.bake.source
    origin = source.url or (f"recipe:{source.recipe}" if source.recipe else f"file:{source.image}")
    return {
        origin: bake.source_sha256,
        f"file:{bake.loaded.path.name}": hashlib.sha256(bake.loaded.content).hexdigest(),
        f"pkg:generic/guest-agent@{bake.archive.version}": bake.archive.sha256,
    }


def _document(bake: Bake, images: Mapping[str, str]) -> dict[str, Any]:
    guest = bake.planned.guest.as_json()
    proof = bake.proof.as_json() if bake.proof else None
    if proof:
        del proof["image"]  # a private path
    return {
        "schema": SCHEMA,
        "key": bake.key,
        "name": bake.loaded.name,
        "bake": bake.loaded.bake.model_dump(exclude_none=True),
        "source": {"sha256": bake.source_sha256},
        "guest": guest,
        "plan": [operation.as_json() for operation in bake.planned.operations],
        "notes": list(bake.changed.notes),
        "changed": [str(path) for path in bake.changed.changed],
        "verified": bake.contents.verification.checked,
        "receipt": json.loads(serialise_receipt(bake.contents.receipt)),
        "packages": {
            "count": len(bake.contents.packages.packages),
            "databases": [str(path) for path in bake.contents.packages.databases],
            "gaps": list(bake.contents.packages.gaps),
        },
        "proof": proof,
        "images": dict(images),
        "seconds": {name: round(value, 3) for name, value in bake.seconds.items()},
        "versions": {
            "vmprovision": __version__,
            "agent": bake.archive.version,
            "agent_sha256": bake.archive.sha256,
            "python": platform.python_version(),
            "qemu-img": _qemu_version(),
        },
    }


def _qemu_version() -> str:
    return run(["qemu-img", "--version"], timeout=VERSION_SECONDS).stdout.partition("\n")[0]


def _junit(bake: Bake) -> bytes:
    checks = "\n".join(bake.proof.checks) if bake.proof else ""
    cases = [
        TestCase(
            group=f"vmprovision.bake.{bake.loaded.name}",
            name=name,
            seconds=seconds,
            output=checks if name == "prove" else "",
        )
        for name, seconds in bake.seconds.items()
    ]
    return junit_document("vmprovision bake", cases, seconds=sum(bake.seconds.values()))
