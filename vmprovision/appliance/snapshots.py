"""Change a guest whose root is a read-only snapshot: in a new snapshot, which then boots.

transactional-update(8) of openSUSE changes such a guest in this way, with snapper(8): a
writable copy of the default snapshot is changed, made read-only, and becomes the default.
The old ones stay, and a person may boot them again. snapper finds its snapshots by the
``info.xml`` beside each (``Snapshot.cc`` of snapper 0.13).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.appliance.filesystem import ApplianceFilesystem
from vmprovision.appliance.mounting import mount_root, unix_root
from vmprovision.appliance.session import ApplianceCallError
from vmprovision.disklayout.subvolumes import BTRFS, name_subvolume, split_subvolume
from vmprovision.errors import ApplianceError, UnsupportedGuestError, printable
from vmprovision.filesystem.protocol import Attributes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.appliance.mounting import MountedGuest, Mounting
    from vmprovision.appliance.session import Appliance

TOP_LEVEL = 5  # the number of the tree above all subvolumes
OF_SNAPPER = re.compile(r"(?P<folder>(?:.*/)?\.snapshots)/(?P<number>\d{1,9})/snapshot")
NUMBER = re.compile(r"[1-9]\d{0,8}")
# Since version 5, transactional-update keeps /etc as a subvolume in the snapshot. Beside a
# snapshot that waits for its first boot it has the state of the running guest's /etc.
NESTED = ("etc", "etc/etc.syncpoint")
INFO = """\
<?xml version="1.0"?>
<snapshot>
  <type>single</type>
  <num>{number}</num>
  <date>{date}</date>
  <description>Guest agent changed in #{base}</description>
  <cleanup>number</cleanup>
</snapshot>
"""
_HINT = (
    "use `vmprovision seed`, or make it writable in the guest by "
    "`btrfs property set -ts / ro false`"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subvolumes:
    """The subvolumes of a btrfs.

    Attributes:
        numbers: path below the top level -> number.
        default: the number of the default one.
    """

    numbers: dict[str, int]
    default: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSnapshot:
    """The snapshot that is changed in place of the default one.

    Attributes:
        node: the device of the filesystem.
        folder: the directory of snapper's snapshots, below the top level.
        number: its number for snapper.
        base: that of the snapshot from which it was made.
        nested: the subvolumes in it.
    """

    node: str
    folder: str
    number: int
    base: int
    nested: tuple[str, ...]

    @property
    def place(self) -> PurePosixPath:
        """The directory that holds it and snapper's description of it."""
        return PurePosixPath("/", self.folder, str(self.number))

    @property
    def path(self) -> PurePosixPath:
        """The snapshot itself."""
        return self.place / "snapshot"


def enter_snapshot(mounting: Mounting, guest: MountedGuest, *, is_named: bool) -> MountedGuest:
    """Return the guest in a new snapshot of its root, if the root is a read-only one.

    A guest that is only read is mounted as it is; a note says what an injection would do.

    Args:
        mounting: the guest, whose root is on btrfs.
        guest: what is mounted.
        is_named: whether the boot menu names the root.

    Raises:
        UnsupportedGuestError: the root is read-only, and a new snapshot would not boot.
        ApplianceCallError: none can be made.
    """
    if not _is_read_only(mounting.appliance, "/"):
        return guest
    node, path = split_subvolume(mounting.root.device)
    known = list_mounted_subvolumes(mounting.appliance, path)
    if path is None:
        path = next((name for name, each in known.numbers.items() if each == known.default), "")
    match = OF_SNAPPER.fullmatch(path)
    obstacle = ""
    if is_named:
        obstacle = "the boot menu names it, so a new one would not boot"
    elif known.numbers.get(path) != known.default:
        obstacle = "it is not the default one, so it does not boot"
    sentence = f"the root is the read-only snapshot {printable(path)} of {node}"
    if match is None or obstacle:
        sentence = f"{sentence}, and {obstacle or 'snapper does not manage it'}"
        if not mounting.readonly:
            raise UnsupportedGuestError(sentence, hint=_HINT)
    elif not mounting.readonly:
        return _begin(mounting, known, node, match)
    else:
        sentence += ": an injection is made in a new one, which then boots"
    return replace(guest, notes=(*guest.notes, sentence))


def _is_read_only(appliance: Appliance, place: str) -> bool:
    """Return whether the subvolume at a place cannot be written to."""
    try:
        return appliance.is_sealed(place)
    except ApplianceCallError:
        return False


def _begin(mounting: Mounting, known: Subvolumes, node: str, match: re.Match[str]) -> MountedGuest:
    """Make a writable snapshot of the default one, and mount the guest in it."""
    appliance = mounting.appliance
    folder, base = match["folder"], match["number"]
    _mount_top(appliance, node)
    there = ApplianceFilesystem(appliance).list_directory(PurePosixPath("/", folder))
    new = NewSnapshot(
        node=node,
        folder=folder,
        number=1 + max(int(name) for name in (base, *there) if NUMBER.fullmatch(name)),
        base=int(base),
        nested=tuple(name for name in NESTED if f"{match[0]}/{name}" in known.numbers),
    )
    appliance.call("mkdir", str(new.place))
    old = PurePosixPath("/", match[0])
    appliance.call("btrfs_subvolume_snapshot", str(old), str(new.path))
    for name in new.nested:  # a snapshot has an empty directory in place of each
        appliance.call("rmdir", str(new.path / name))
        appliance.call("btrfs_subvolume_snapshot", str(old / name), str(new.path / name))
    appliance.unmount()
    device = name_subvolume(node, str(new.path).lstrip("/"))
    files = mount_root(appliance, device, readonly=False, driver=mounting.driver_of(device))
    root = unix_root(files, device)
    if root is None:  # it was one a moment ago
        raise ApplianceError(f"the new snapshot {device} lacks the files of its origin")
    again = replace(mounting, files=files, root=root, mountpoints={}, done={})
    return replace(again.mount_wanted(), snapshot=new)


def finish_snapshot(appliance: Appliance, new: NewSnapshot) -> None:
    """Describe the new snapshot to snapper, make it read-only, and make it the default.

    Raises:
        ApplianceError: that failed; the image must not be committed.
    """
    _mount_top(appliance, new.node)
    files = ApplianceFilesystem(appliance)
    info = new.place / "info.xml"
    old = new.place.parent / str(new.base)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    content = INFO.format(number=new.number, base=new.base, date=date).encode()
    files.write(info, content, Attributes(mode=0o644, label=files.label(old / info.name)))
    if label := files.label(old):
        files.set_label(new.place, label)
    place = shlex.quote(f"/sysroot{new.path}")
    appliance.call("debug", "sh", [f"btrfs property set -ts {place} ro true"])
    if not _is_read_only(appliance, str(new.path)):
        raise ApplianceError(f"the snapshot {new.path} of {new.node} cannot be made read-only")
    known = list_mounted_subvolumes(appliance, "")
    appliance.call("btrfs_subvolume_set_default", known.numbers[str(new.path).lstrip("/")], "/")


def discard_snapshot(appliance: Appliance, new: NewSnapshot) -> None:
    """Delete a new snapshot in which nothing was changed.

    Raises:
        ApplianceError: that failed.
    """
    _mount_top(appliance, new.node)
    for name in (*reversed(new.nested), ""):
        appliance.call("btrfs_subvolume_delete", str(new.path / name))
    appliance.call("rmdir", str(new.place))


def list_mounted_subvolumes(appliance: Appliance, mounted: str | None) -> Subvolumes:
    """Return the subvolumes of the btrfs that is mounted as the guest's root.

    btrfs(8) names those inside the mounted subvolume from there on, and all others from
    the top level on.

    Args:
        appliance: has it.
        mounted: the path of the mounted subvolume, "" for the top level, None for the default.

    Raises:
        ApplianceCallError: they cannot be listed.
    """
    try:
        found = appliance.call("btrfs_subvolume_list", "/")
    except UnicodeDecodeError as exc:
        raise ApplianceCallError("the name of a subvolume is not valid UTF-8", number=0) from exc
    default = int(appliance.call("btrfs_subvolume_get_default", "/"))
    paths, above = {}, {}
    for each in found:
        number = int(each["btrfssubvolume_id"])
        paths[number] = str(each["btrfssubvolume_path"])
        above[number] = int(each["btrfssubvolume_top_level_id"])
    # one inside it, of the same name, is younger
    same = [number for number, path in paths.items() if path == mounted]
    here = default if mounted is None else min(same, default=TOP_LEVEL)
    start = f"{paths[here]}/" if here in paths else ""
    full = {
        number: f"{start}{path}" if _is_below(number, here, above) else path
        for number, path in paths.items()
    }
    # a comma would end the mount option that names the subvolume
    plain = {path: number for number, path in full.items() if "," not in path}
    return Subvolumes(numbers=plain, default=default)


def _is_below(number: int, here: int, above: Mapping[int, int]) -> bool:
    """Return whether a subvolume is inside another one."""
    for _ in above:
        number = above.get(number, TOP_LEVEL)
        if number in (here, TOP_LEVEL):
            break
    return number == here


def _mount_top(appliance: Appliance, node: str) -> None:
    """Mount the tree above all subvolumes in place of the guest."""
    appliance.unmount()
    appliance.mount(node, BTRFS, "/", readonly=False, options=f"subvolid={TOP_LEVEL}")
