"""The edit that every way makes: the files and links of an injection, without its receipt.

They are a tree in a folder, with a list beside it for the ways that work call by call.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import vmprovision
from vmprovision.changes.operations import MakeDirectory, Symlink, WriteFile
from vmprovision.changes.receipt import RECEIPT

if TYPE_CHECKING:
    from pathlib import Path, PurePosixPath

    from vmprovision.changes.operations import Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """The edit of one guest, and where the guest's root is.

    Attributes:
        operations: directories, files and links, in order.
        tree: a folder of the host that holds them as the guest should.
        manifest: a JSON list of them: ``kind``, ``path``, and ``source`` and ``mode``
            of files or ``target`` of links.
        root: the device of the guest's root.
    """

    operations: tuple[Operation, ...]
    tree: Path
    manifest: Path
    root: str

    def local(self, path: PurePosixPath) -> Path:
        """Return the host's copy of a file of the edit."""
        return self.tree / path.relative_to("/")

    def missing_in(self, image: Path, disk_format: str) -> list[str]:
        """Return the parts of the edit that are absent or wrong in the guest of an image."""
        paths = {each.path for each in self.operations}
        report = vmprovision.plan(image, source=vmprovision.ImageOptions(format=disk_format))
        wanting = [planned.operation.path for planned in report.operations if not planned.satisfied]
        return [str(path) for path in wanting if path in paths]


def edit_for(image: Path, folder: Path, *, disk_format: str = "qcow2") -> Edit:
    """Return the edit that an injection would make, laid out in a folder."""
    report = vmprovision.plan(image, source=vmprovision.ImageOptions(format=disk_format))
    operations = tuple(
        planned.operation
        for planned in report.operations
        if planned.operation.path != RECEIPT and not planned.satisfied
    )
    edit = Edit(
        operations=operations,
        tree=folder / "tree",
        manifest=folder / "manifest.json",
        root=report.guest.mountpoints["/"],
    )
    edit.manifest.write_text(json.dumps([_laid_out(edit, each) for each in operations]))
    return edit


def _laid_out(edit: Edit, operation: Operation) -> dict[str, str | int]:
    local = edit.local(operation.path)
    local.parent.mkdir(parents=True, exist_ok=True)
    path = str(operation.path)
    if isinstance(operation, MakeDirectory):
        local.mkdir(exist_ok=True)
        return {"kind": "directory", "path": path}
    if isinstance(operation, WriteFile):
        local.write_bytes(operation.content)
        local.chmod(operation.mode)
        return {"kind": "file", "path": path, "source": str(local), "mode": operation.mode}
    assert isinstance(operation, Symlink), operation
    local.symlink_to(operation.target)
    return {"kind": "link", "path": path, "target": str(operation.target)}
