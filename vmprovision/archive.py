"""The agent as one file: a zip archive of its source behind a few lines of POSIX shell.

The kernel starts the shell, the shell finds an interpreter, and Python runs the
same file as a zip archive (zipapp, PEP 441): what stands before the archive does
not disturb it.  The same source gives the same bytes.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vmprovision import agent
from vmprovision.plan import digest
from vmprovision.rendering import render

PACKAGE = "guest_agent"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can hold
ENTRY_POINT = b"""\
import sys

from guest_agent.main import main

sys.exit(main(sys.argv))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """The agent, ready to be put into a guest: its bytes and its version."""

    content: bytes
    version: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        return digest(self.content)


def build_archive() -> Archive:
    """The agent that belongs to this vmprovision; equal sources give equal bytes."""
    source = Path(agent.__file__).parent
    members = {"__main__.py": ENTRY_POINT}
    for path in sorted(source.glob("*.py")):
        if path.name != "__main__.py":
            members[f"{PACKAGE}/{path.name}"] = path.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in sorted(members.items()):
            archive.writestr(_member(name), content, compresslevel=9)
    version: str = agent.__version__
    launcher = render("agent/launcher.sh.j2", version=version)
    return Archive(content=launcher + buffer.getvalue(), version=version)


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.create_system = 3  # Unix, whatever the host is
    info.external_attr = 0o644 << 16
    return info
