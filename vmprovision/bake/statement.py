"""Describe the images' origin as an in-toto statement with SLSA's provenance predicate.

Formats: in-toto Statement v1, SLSA Provenance v1. The statement is not signed; CI
systems sign such statements with their own identity.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from vmprovision import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:vmprovision:bake:v1"
LOCAL_BUILDER = "urn:vmprovision:host"


def make_statement(  # noqa: PLR0913 -- what it states
    subjects: Mapping[str, str],
    materials: Mapping[str, str],
    *,
    parameters: Mapping[str, Any],
    key: str,
    begun: datetime,
    ended: datetime,
) -> bytes:
    """Return the statement as JSON.

    Args:
        subjects: the SHA-256 of each image by its name.
        materials: the SHA-256 of their inputs, by URI.
        parameters: the bake file's content.
        key: the bake's key.
        begun: when the bake began.
        ended: when the bake ended.
    """
    document = {
        "_type": STATEMENT,
        "subject": _resources(subjects, "name"),
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": dict(parameters),
                "resolvedDependencies": _resources(materials, "uri"),
            },
            "runDetails": {
                "builder": {"id": _builder(), "version": {"vmprovision": __version__}},
                "metadata": {
                    "invocationId": key,
                    "startedOn": begun.isoformat(timespec="seconds"),
                    "finishedOn": ended.isoformat(timespec="seconds"),
                },
            },
        },
    }
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def _resources(named: Mapping[str, str], label: str) -> list[dict[str, Any]]:
    return [{label: name, "digest": {"sha256": digest}} for name, digest in named.items()]


def _builder() -> str:
    """Return the builder: the workflow that GitHub's runner names, else an unnamed host."""
    server, workflow = (os.environ.get(n) for n in ("GITHUB_SERVER_URL", "GITHUB_WORKFLOW_REF"))
    return f"{server}/{workflow}" if server and workflow else LOCAL_BUILDER
