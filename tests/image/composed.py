"""Disks put together on the host: a table by sfdisk, filesystems by mkfs, no appliance."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.conftest import require
from tests.image.tiny import PATH
from tests.trees import make_tree

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.trees import Link, Program

MB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A partition: its type and place as sfdisk has them, and what makes its content.

    Attributes:
        line: for sfdisk(8), without the size.
        maker: the command, the file's name to be added; nothing is put there without one.
        files: what an ext filesystem holds.
        patch: offset -> bytes that are written afterwards.
    """

    line: str
    maker: Sequence[str] = ()
    size_mb: int = 8
    files: Mapping[str, str | bytes | Link | Program | None] | None = None
    patch: Mapping[int, bytes] = field(default_factory=dict)


def ext4(line: str = "", *options: str, files: object = None, size_mb: int = 16) -> Part:
    """Return an ext4 partition that holds these files."""
    maker = ("mke2fs", "-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", *options)
    return Part(line=line, maker=maker, files=files, size_mb=size_mb)  # type: ignore[arg-type]  # a mapping, as Part has it


def compose_disk(image: Path, label: str, parts: Sequence[Part]) -> Path:
    """Return a raw disk with this kind of table and these partitions."""
    size = sum(part.size_mb for part in parts) + 4
    with image.open("wb") as file:
        file.truncate(size * MB)
    lines = [f"{part.line},size={part.size_mb}MiB".strip(",") for part in parts]
    run_tool("sfdisk", "-q", str(image), stdin="\n".join([label, *lines]))
    for part, start in zip(parts, starts_of(image), strict=True):
        if part.maker:
            with tempfile.TemporaryDirectory() as folder:
                content = _make(part, Path(folder))
            with image.open("r+b") as file:
                file.seek(start)
                file.write(content)
    return image


def starts_of(image: Path) -> list[int]:
    """Return where a disk's partitions begin by sfdisk: in bytes, in the table's order."""
    table = json.loads(run_tool("sfdisk", "--json", str(image)))["partitiontable"]
    return [part["start"] * 512 for part in table.get("partitions", ())]


def _make(part: Part, folder: Path) -> bytes:
    file = folder / "partition"
    with file.open("wb") as made:
        made.truncate(part.size_mb * MB)
    options: list[str] = []
    if part.files is not None:
        options = ["-d", str(make_tree(folder / "tree", part.files))]
    run_tool(*part.maker, *options, str(file))
    content = bytearray(file.read_bytes())
    for offset, patch in part.patch.items():
        content[offset : offset + len(patch)] = patch
    return bytes(content)


def run_tool(name: str, *options: str, stdin: str = "") -> str:
    """Return what a tool of the host prints; the test is skipped where it is missing."""
    program = shutil.which(name, path=PATH)
    require(program, f"{name} is not installed")
    done = subprocess.run(
        [str(program), *options], input=stdin, check=True, capture_output=True, text=True
    )
    return done.stdout
