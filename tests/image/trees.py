"""What a guest holds, file by file, so that two states of an image can be compared."""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.session import Drive, launch, open_appliance
from vmprovision.progress import Control

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vmprovision.appliance.session import Appliance

TAR_SECONDS = 900.0
XATTR = "SCHILY.xattr."


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One filesystem of an image: the device's part after ``/dev/sdX``, or all of its name."""

    device: str
    at: str = "/"
    options: str = ""


@dataclass(frozen=True, slots=True)
class Stands:
    """The state of one guest path, without times, because reading a file changes them."""

    kind: str
    mode: int
    uid: int
    gid: int
    content: str
    xattrs: str


Tree = dict[str, Stands]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """An image to look into, and how its filesystems lie."""

    path: Path
    format: str
    mounts: Sequence[Mount]


def look_into(sight: Sight, scratch: Path) -> Tree:
    """Return the tree of an image."""
    drive = Drive(path=sight.path, format=sight.format, readonly=True)
    # LVM runs in a stock appliance from the start
    opener = (
        launch if any(mount.device.startswith("/") for mount in sight.mounts) else open_appliance
    )
    with opener([drive], control=Control()) as appliance:
        return read_tree(appliance, 0, sight.mounts, scratch)


def read_tree(appliance: Appliance, drive: int, mounts: Sequence[Mount], scratch: Path) -> Tree:
    """Return the tree on one drive, all its filesystems mounted as the guest has them."""
    for mount in mounts:
        device = on_drive(drive, mount.device)
        appliance.call("mount_options", f"ro,{mount.options}".rstrip(","), device, mount.at)
    archive = scratch / f"tree-{drive}.tar"
    try:
        appliance.call("tar_out", "/", str(archive), xattrs=True, limit=TAR_SECONDS)
        return tree_of(archive)
    finally:
        archive.unlink(missing_ok=True)
        appliance.call("umount_all")
        if appliance.has_volumes:  # a volume that is active holds its disk
            appliance.call("vg_activate_all", False)  # noqa: FBT003 -- libguestfs's


def on_drive(drive: int, device: str) -> str:
    """Return the appliance's name of a partition (``1``) or the whole (``""``) of a drive."""
    return device if device.startswith("/") else f"/dev/sd{chr(ord('a') + drive)}{device}"


def tree_of(archive: Path) -> Tree:
    """Return the tree in a tar archive, which is read and never unpacked."""
    tree: Tree = {}
    with tarfile.open(archive) as opened:
        for member in opened:
            path = "/" + member.name.removeprefix(".").strip("/")
            if member.islnk():  # another name of a file that came before
                tree[path] = tree["/" + member.linkname.removeprefix(".").strip("/")]
                continue
            content = member.linkname
            if member.isreg() and (stream := opened.extractfile(member)):
                content = hashlib.sha256(stream.read()).hexdigest()
            xattrs = sorted(
                f"{key.removeprefix(XATTR)}={value}"
                for key, value in member.pax_headers.items()
                if key.startswith(XATTR)
            )
            tree[path] = Stands(
                member.type.decode("ascii"),
                member.mode,
                member.uid,
                member.gid,
                content,
                "\n".join(xattrs),
            )
    return tree


def differences(before: Tree, after: Tree) -> dict[str, tuple[Stands | None, Stands | None]]:
    """Return each path at which two trees differ, with what was there and what is there now."""
    return {
        path: (before.get(path), after.get(path))
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    }


def as_json(tree: Tree) -> dict[str, Any]:
    """Return a tree for ``json.dump``."""
    return {path: asdict(stands) for path, stands in tree.items()}


def from_json(document: dict[str, Any]) -> Tree:
    """Return a tree that ``as_json`` made."""
    return {path: Stands(**stands) for path, stands in document.items()}
