"""Build the agent as one file: a zip archive of its source after a few lines of POSIX shell.

The kernel starts the shell, the shell finds an interpreter, and Python runs the same
file as a zip archive (zipapp, PEP 441), which may follow other content.  The source of
all modules is one member, because one member compresses better than many.  ``__main__``
loads from it the modules that are always needed, and each other module when the agent
asks for it: the heap of a small guest has no room for more.  Comments, docstrings and
needless space, a third of the source, are left out.  Equal sources give equal bytes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision import agent
from vmprovision.changes.blocks import marked
from vmprovision.changes.conditions import digest
from vmprovision.changes.operations import EditBlock, Symlink, WriteFile
from vmprovision.changes.receipt import RUNTIME
from vmprovision.guest.configuration import DEFAULT_PORT
from vmprovision.host.cache import cached_content
from vmprovision.host.data import data_directory
from vmprovision.initsystem import DEFINITIONS
from vmprovision.initsystem.rendering import Service, render
from vmprovision.runtime.condensing import condense, rename

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vmprovision.changes.operations import Operation
    from vmprovision.guest.facts import InitVerdict
    from vmprovision.initsystem.definition import Definition, Live, Variant

PACKAGE = "guest_agent"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can hold
# Python 2.6 to 3.14 and MicroPython run it. Making modules by hand needs no import finder, which
# would differ between these.
ENTRY_POINT = b"""\
import gc
import sys

import guest_agent

try:
    from _guest import new_module
except ImportError:
    new_module = type(sys)

def unpack(wanted):
    gc.collect()  # frees what the last call unpacked
    if hasattr(guest_agent, "__loader__"):
        source = guest_agent.__loader__.get_data("guest_agent/modules")
    else:
        source = open(guest_agent.__path__ + "/modules", "rb").read()
    at = 0
    while at < len(source):
        start = source.find(b"\\n", at) + 1
        name, size = str(source[at:start].decode()).split()
        at = start + int(size)
        if wanted in ("", name):
            module = sys.modules["guest_agent." + name] = new_module("guest_agent." + name)
            module.__package__ = "guest_agent"
            setattr(guest_agent, name, module)
            code = compile(source[start:at].decode(), "guest_agent/%s.py" % name, "exec")
            exec(code, module.__dict__)
        if name == (wanted or "main"):
            break

guest_agent.unpack = unpack
unpack("")
sys.exit(guest_agent.main.main(sys.argv))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """The agent as it goes into a guest: its bytes and its version."""

    content: bytes
    version: str

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the content, in hexadecimal."""
        return digest(self.content)


def build_archive(runtime: bytes | None = None) -> Archive:
    """Return the agent of this vmprovision; equal sources give equal bytes.

    Args:
        runtime: the interpreter that the file begins with; without one, the first lines of
            the file find a Python.
    """
    version: str = agent.__version__
    launcher = runtime or render("agent/launcher.sh.j2", version=version, runtime=RUNTIME)
    return Archive(content=launcher + _zip(), version=version)


@functools.cache
def _zip() -> bytes:
    """Return the part that is the same for every guest, from the cache if it is there."""
    return cached_content("agent", _sources_digest(), _build_zip)


def _sources_digest() -> str:
    """Return a digest of all modules and templates, since any may affect the archive."""
    inputs = hashlib.sha256(sys.version.encode())
    package = Path(agent.__file__).parents[1]
    for folder, pattern in ((package, "*.py"), (data_directory("templates"), "*")):
        for path in sorted(folder.rglob(pattern)):
            if path.is_file():
                inputs.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
                inputs.update(path.read_bytes())
    return inputs.hexdigest()


def _build_zip() -> bytes:
    sources = {
        path.stem: condense(path.read_text("ascii"))
        for path in sorted(Path(agent.__file__).parent.glob("*.py"))
        if path.stem not in {"__main__", "__init__"}
    }
    sources["services"] = render_services()
    core = _in_order(sources, "main")
    sources = rename(sources)
    members = {
        "__main__.py": ENTRY_POINT,
        f"{PACKAGE}/__init__.py": f'__version__ = "{agent.__version__}"\n'.encode(),
        f"{PACKAGE}/modules": _bundle(sources, [*core, *sorted(sources.keys() - set(core))]),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in sorted(members.items()):
            archive.writestr(_member(name), content, compresslevel=9)
    return buffer.getvalue()


def _in_order(sources: Mapping[str, str], name: str) -> list[str]:
    """Return a module and those that it imports at its head, each after those that it needs."""
    found: list[str] = []
    for names, module in _IMPORT.findall(sources[name]):
        for needed in [module] if module else names.split(","):
            if needed in sources:
                found += [each for each in _in_order(sources, needed) if each not in found]
    return [*found, name]


_IMPORT = re.compile(r"^from\.(?:import ([\w,]+)|(\w+) import )", re.MULTILINE)


def _bundle(sources: Mapping[str, str], names: Iterable[str]) -> bytes:
    """Return modules in one piece: for each a line with name and size, then its source."""
    return b"".join(f"{name} {len(sources[name])}\n{sources[name]}".encode() for name in names)


def render_services() -> str:
    """Return the agent's module ``services``: every variant that a running system can install."""
    begin, end = (line.encode() for line in marked(Service().name, b"").decode().splitlines())
    names = {
        "CONFIGURATION": render("agent/guest-agent.conf.j2", settings={"PORT": DEFAULT_PORT}),
        "BEGIN": begin,
        "END": end,
        "VARIANTS": tuple(
            _as_parts(definition, variant, verdict, variant.live)
            for definition in DEFINITIONS
            for variant, verdict in zip(
                definition.variants, definition.without_guest(), strict=True
            )
            if variant.live
        ),
    }
    return condense("".join(f"{name} = {value!r}\n" for name, value in names.items()))


def _as_parts(
    definition: Definition, variant: Variant, verdict: InitVerdict, live: Live
) -> tuple[object, ...]:
    """Return the parts of the agent's ``install._Variant``, in their order."""
    operations = definition.service_operations(Service(), verdict)
    return (
        f"{definition.name} {variant.dialect}".strip(),
        live.processes,
        live.files,
        live.start,
        live.stop,
        live.afterwards,
        tuple(_as_tuple(operation) for operation in operations),
    )


def _as_tuple(operation: Operation) -> tuple[str, str, int, bytes | str]:
    """Return an operation as kind, path, mode, and the content or the link's target."""
    path = str(operation.path)
    if isinstance(operation, WriteFile):
        return "file", path, operation.mode, operation.content
    if isinstance(operation, EditBlock):
        return "block", path, operation.mode, operation.content
    if isinstance(operation, Symlink):
        return "link", path, 0, operation.target
    raise TypeError(f"the agent cannot perform {operation}")


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.create_system = 3  # Unix, whatever the host is
    info.external_attr = 0o644 << 16
    return info
