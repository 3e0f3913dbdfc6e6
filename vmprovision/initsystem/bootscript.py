"""Lines in a script that runs at boot, such as ``rc.local``, before its last ``exit``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmprovision.changes.operations import EditBlock
from vmprovision.initsystem.rendering import render

if TYPE_CHECKING:
    from pathlib import PurePosixPath

    from vmprovision.initsystem.rendering import Service

EXECUTABLE = 0o111  # boot skips a script that is not executable


def block_in_script(path: PurePosixPath, service: Service, content: bytes) -> EditBlock:
    """Return the operation that adds these lines to a boot script, which it makes if missing."""
    return EditBlock(
        path=path,
        name=service.name,
        content=content,
        before="exit",
        prologue=b"#!/bin/sh\n",
        mode=EXECUTABLE,
    )


def loop_in_script(path: PurePosixPath, service: Service) -> EditBlock:
    """Return the operation that makes a boot script start a loop, which restarts the agent."""
    return block_in_script(path, service, render("shared/loop.j2", service=service))
