"""Find the programs that set this guest up at its first boot from data of its host."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.filesystem.protocol import read_text, resolved_file, status_of
from vmprovision.guest.facts import FirstBoot

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestReader

CLOUD_INIT = ("/usr/bin/cloud-init", "/usr/local/bin/cloud-init")
CLOUD_INIT_DISABLED = PurePosixPath("/etc/cloud/cloud-init.disabled")
CLOUD_CONFIGURATION = PurePosixPath("/etc/cloud/cloud.cfg")
CLOUD_FOLDER = PurePosixPath("/etc/cloud/cloud.cfg.d")
IGNITION = (
    "/usr/lib/dracut/modules.d/30ignition",
    "/usr/lib/systemd/system/ignition-delete-config.service",
)
FILES_LIMIT = 50  # files of cloud-init's configuration that are read
_SOURCES = re.compile(r"^datasource_list:\s*\[([^\]\n]*)\]", re.MULTILINE)


def find_first_boot(reader: GuestReader) -> tuple[FirstBoot, ...]:
    """Return the guest's first-boot programs, each with what prevents it from using a seed."""
    found = []
    if any(resolved_file(reader, path) for path in CLOUD_INIT):
        found.append(FirstBoot(program="cloud-init", obstacle=_cloud_init_obstacle(reader)))
    if any(status_of(reader, PurePosixPath(path)) for path in IGNITION):
        found.append(FirstBoot(program="ignition"))
    return tuple(found)


def _cloud_init_obstacle(reader: GuestReader) -> str:
    """Return why cloud-init would ignore a NoCloud seed, as a sentence; empty if it would not."""
    if status_of(reader, CLOUD_INIT_DISABLED):
        return f"cloud-init is disabled by {CLOUD_INIT_DISABLED}"
    names = [name for name in reader.list_directory(CLOUD_FOLDER) if name.endswith(".cfg")]
    paths = [CLOUD_CONFIGURATION, *(CLOUD_FOLDER / name for name in names[:FILES_LIMIT])]
    obstacle = ""
    for path in paths:  # the last one that names sources counts
        for match in _SOURCES.finditer(read_text(reader, path) or ""):
            sources = {source.strip(" \t'\"") for source in match[1].split(",")}
            obstacle = "" if "NoCloud" in sources else f"{path} leaves NoCloud out of its sources"
    return obstacle
