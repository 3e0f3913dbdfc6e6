"""The operations of a plan as an Ignition configuration, specification 3.0.0.

Ignition runs in the initial RAM disk of the first boot, before any service starts, so
links enable the service as in an injection.  The configuration uses the oldest version
of the specification that suffices, because every later Ignition accepts it.
"""

from __future__ import annotations

import base64
import gzip
import json
from typing import TYPE_CHECKING, Any

from vmprovision.changes.operations import MakeDirectory, Symlink, WriteFile
from vmprovision.errors import UnsupportedGuestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmprovision.changes.operations import Operation
    from vmprovision.guest.facts import InitVerdict

SPECIFICATION = "3.0.0"


def make_configuration(operations: Sequence[Operation], init: InitVerdict) -> bytes:
    """Return the Ignition configuration, as JSON.

    Raises:
        UnsupportedGuestError: the guest's init system is not systemd.
    """
    if init.system != "systemd":
        raise UnsupportedGuestError(
            f"Ignition needs systemd, and this guest has {init.system}",
            hint="write to the image with `vmprovision inject`",
        )
    storage: dict[str, list[dict[str, Any]]] = {"directories": [], "files": [], "links": []}
    for operation in operations:
        path = str(operation.path)
        if isinstance(operation, MakeDirectory):
            storage["directories"].append({"path": path, "mode": operation.mode})
        elif isinstance(operation, WriteFile):
            storage["files"].append(_file(operation))
        elif isinstance(operation, Symlink):
            link = {"path": path, "target": operation.target, "overwrite": True}
            storage["links"].append(link)
    document = {"ignition": {"version": SPECIFICATION}, "storage": storage}
    return (json.dumps(document, indent=1) + "\n").encode("ascii")


def _file(operation: WriteFile) -> dict[str, Any]:
    packed = base64.b64encode(gzip.compress(operation.content, mtime=0)).decode("ascii")
    return {
        "path": str(operation.path),
        "mode": operation.mode,
        "overwrite": True,
        "contents": {"source": f"data:;base64,{packed}", "compression": "gzip"},
    }
