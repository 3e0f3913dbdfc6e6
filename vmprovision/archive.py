"""The agent as one file: a zip archive of its source behind a few lines of POSIX shell.

The kernel starts the shell, the shell finds an interpreter, and Python runs the
same file as a zip archive (zipapp, PEP 441): what stands before the archive does
not disturb it.  Comments and docstrings, more than a quarter of it, stay at home.  The same
source gives the same bytes.
"""

from __future__ import annotations

import functools
import io
import tokenize
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision import agent
from vmprovision.configuration import DEFAULT_PORT
from vmprovision.guest import InitVerdict
from vmprovision.initsystem import INIT_SYSTEMS
from vmprovision.plan import EditBlock, Symlink, WriteFile, digest, marked
from vmprovision.receipt import RUNTIME
from vmprovision.rendering import Service, render

if TYPE_CHECKING:
    from pathlib import PurePosixPath

    from vmprovision.guest import InitSystem
    from vmprovision.plan import Operation

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


def build_archive(runtime: bytes | None = None) -> Archive:
    """The agent that belongs to this vmprovision; equal sources give equal bytes.

    Args:
        runtime: what runs it; without, the first lines of the file find a Python.
    """
    version: str = agent.__version__
    launcher = runtime or render("agent/launcher.sh.j2", version=version, runtime=RUNTIME)
    return Archive(content=launcher + _zip(), version=version)


@functools.cache
def _zip() -> bytes:
    """The part that is the same for every guest, made once in a process (60 ms)."""
    source = Path(agent.__file__).parent
    members = {"__main__.py": ENTRY_POINT}
    for path in sorted(source.glob("*.py")):
        if path.name != "__main__.py":
            members[f"{PACKAGE}/{path.name}"] = condense(path.read_text("ascii")).encode()
    members[f"{PACKAGE}/services.py"] = _services()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in sorted(members.items()):
            archive.writestr(_member(name), content, compresslevel=9)
    return buffer.getvalue()


def _services() -> bytes:
    """A module with what each init system gets, for ``guest-agent install``.

    Only what takes files, links and lines of one file: s6 may need its compiler,
    and startpar's makefiles are made by Debian's own ``update-rc.d``.  Nor does it
    look at how old systemd is.
    """
    begin, end = (line.encode() for line in marked(Service().name, b"").decode().splitlines())
    services = {
        f"{module.NAME} {dialect}".strip(): [
            _as_tuple(operation)
            for operation in module.service_operations(
                Service(), _verdict(module.NAME, dialect, hook)
            )
        ]
        for module in INIT_SYSTEMS
        for dialect, hook in reversed(module.VARIANTS)
        if module.NAME != "s6" and dialect not in ("debian-startpar", "static-user")
    }
    names = {
        "CONFIGURATION": render("agent/guest-agent.conf.j2", settings={"PORT": DEFAULT_PORT}),
        "BEGIN": begin,
        "END": end,
        "SERVICES": services,
    }
    return "".join(f"{name} = {value!r}\n" for name, value in names.items()).encode("ascii")


def _verdict(system: InitSystem, dialect: str, hook: PurePosixPath | None) -> InitVerdict:
    return InitVerdict(
        system=system, pid1="", confidence="told", evidence=(), hook=hook, dialect=dialect
    )


def _as_tuple(operation: Operation) -> tuple[str, str, int, bytes | str]:
    """Kind, path, mode, and the content or the link's target."""
    path = str(operation.path)
    if isinstance(operation, WriteFile):
        return "file", path, operation.mode, operation.content
    if isinstance(operation, EditBlock):
        return "block", path, operation.mode, operation.content
    if isinstance(operation, Symlink):
        return "link", path, 0, operation.target
    raise TypeError(f"no service needs {operation}")


def condense(source: str) -> str:
    """Python source that does the same without comments, docstrings and blank lines.

    By tokens alone: parsing in one thread disturbs parsing in another (CPython 3.11).
    """
    lines: list[str | None] = [None, *source.splitlines()]  # tokenize counts from 1
    statement: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row] = token.line[:column].rstrip() or None
        elif token.type == tokenize.NL:
            if not token.line.strip():  # blank, and in no string
                lines[row] = None
        elif token.type != tokenize.NEWLINE:
            if token.type not in (tokenize.INDENT, tokenize.DEDENT):
                statement.append(token)
        else:
            if [part.type for part in statement] == [tokenize.STRING]:
                docstring = statement[0]
                last = docstring.end[0]
                lines[docstring.start[0] : last + 1] = [None] * (last + 1 - docstring.start[0])
                lines[last] = " " * docstring.start[1] + "pass"
            statement = []
    return "".join(f"{line}\n" for line in lines if line is not None)


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.create_system = 3  # Unix, whatever the host is
    info.external_attr = 0o644 << 16
    return info
