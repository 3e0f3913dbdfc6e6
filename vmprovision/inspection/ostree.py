"""OSTree guests: find the deployment that boots, and show the guest as it then sees itself.

By ostree(1) and "Deployments" in its manual, the kernel's option ``ostree=`` names a
link below ``/ostree/boot.N``, which leads to
``/ostree/deploy/NAME/deploy/CHECKSUM.SERIAL``. ostree-admin(1) may write a menu that
names no default; then the entry with the highest version boots.
"""

from __future__ import annotations

import configparser
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.errors import InspectionError, UnsupportedGuestError
from vmprovision.filesystem.deployment import DeployedFilesystem
from vmprovision.filesystem.protocol import follow, read_text, status_of
from vmprovision.inspection.bootmenu import read_boot_menus
from vmprovision.inspection.layout import DIRECTORIES
from vmprovision.inspection.watched import WatchedReader
from vmprovision.mounts import HiddenMount, covering_mounts

if TYPE_CHECKING:
    from vmprovision.filesystem.protocol import GuestFilesystem, GuestReader
    from vmprovision.inspection.bootmenu import BootEntry, BootMenu

SYSTEMS = PurePosixPath("/ostree/deploy")
SYSTEMS_LIMIT = 100
INIT = PurePosixPath("/sbin/init")
USR = PurePosixPath("/usr")
LOCAL = PurePosixPath("/usr/local")
PREPARE_ROOT = ("/etc/ostree/prepare-root.conf", "/usr/lib/ostree/prepare-root.conf")
_DEPLOYMENT = re.compile(r"/ostree/deploy/[^/]+/deploy/[0-9a-f]{64}\.\d+")
# ostree-N-NAME.conf; since ostree 2024.5 ostree-N.conf, since 2025.3 with tries: ostree-N+3.conf
# as bootloader_entry_filename in ostree-sysroot-deploy.c writes them
_VERSION = re.compile(r"ostree-(\d{1,9})(?![^+-])")
BOOT = PurePosixPath("/boot")
LOADER = BOOT / "loader"
OF_A_BOOT = frozenset(("loader", "ostree"))  # what ostree makes at the top of a separate /boot


def enter_deployment(disk: GuestFilesystem) -> GuestFilesystem:
    """Return the files of the deployment that boots, or ``disk`` itself without OSTree.

    Raises:
        UnsupportedGuestError: it is unknown which deployment boots, or it keeps no changes.
        InspectionError: the deployment that boots does not exist.
    """
    systems = disk.list_directory(SYSTEMS)
    if not systems:
        return disk
    reader = WatchedReader(disk)
    deployment = _booted(reader) or _only_one(reader, systems)
    guest = DeployedFilesystem(disk, deployment, deployment.parent.parent / "var")
    _refuse_sealed(WatchedReader(guest))
    return guest


def lacks_boot(disk: GuestReader) -> bool:
    """Return whether the boot entries of an OSTree guest are on another filesystem.

    The disk's root has no fstab that says so.
    """
    if not disk.list_directory(SYSTEMS):
        return False
    status = disk.lstat(BOOT)
    is_directory = status is not None and status.kind == "directory"
    return is_directory and disk.lstat(LOADER) is None


def find_covering(guest: GuestReader) -> tuple[HiddenMount, ...]:
    """Return what a deployment's fstab mounts over directories that matter; none is mounted here.

    The disk's root has no fstab, so only the root itself is mounted here.
    """
    mounts = covering_mounts(guest, map(PurePosixPath, DIRECTORIES))
    return tuple(
        HiddenMount(mount=mount, why="of an OSTree guest only the root filesystem is mounted here")
        for mount in mounts
        if mount.at_boot
    )


def _booted(disk: GuestReader) -> PurePosixPath | None:
    """Return the deployment that the boot menu starts, or None if it names none."""
    entries = [entry for menu in read_boot_menus(disk) if (entry := _default_of(menu))]
    named = {entry.ostree for entry in entries if entry.ostree}
    found = {follow(disk, path) for path in named}
    if len(found) > 1:
        raise UnsupportedGuestError(
            "the guest's boot menus start different OSTree deployments",
            hint="boot the guest once, and remove the menu that is not in use",
        )
    for deployment in found:
        if deployment is None or not _DEPLOYMENT.fullmatch(str(deployment)):
            raise InspectionError(
                f"the boot menu names the OSTree deployment {min(named)}, which does not exist",
                hint="check the guest with `ostree admin status --sysroot=DIRECTORY`",
            )
        return deployment
    return None


def find_boot_files(guest: GuestReader) -> BootEntry | None:
    """Return the entry that boots the guest, if it names the files of a kernel."""
    entries = [entry for menu in read_boot_menus(guest) if (entry := _default_of(menu))]
    return next((entry for entry in entries if entry.kernel), None)


def _default_of(menu: BootMenu) -> BootEntry | None:
    """Return the default entry, if it starts a deployment."""
    entries = [entry for entry in menu.may_boot if entry.ostree is not None]
    return max(entries, key=lambda entry: _version(entry.name)) if entries else None


def _version(name: str) -> int:
    match = _VERSION.match(name)
    return int(match[1]) if match else 0


def _only_one(disk: GuestReader, systems: list[str]) -> PurePosixPath:
    """Return the only deployment; it boots even if a boot menu elsewhere cannot be read."""
    folders = [SYSTEMS / name / "deploy" for name in systems[:SYSTEMS_LIMIT]]
    found = [folder / name for folder in folders for name in disk.list_directory(folder)]
    deployments = [path for path in found if _DEPLOYMENT.fullmatch(str(path))]
    if status_of(disk, INIT):
        raise UnsupportedGuestError(
            f"the guest has {INIT} and OSTree deployments, and no boot entry that can be read "
            "here says which of them boots",
            hint=f"remove {SYSTEMS.parent} if the guest does not use it",
        )
    if len(deployments) == 1:
        return deployments[0]
    raise UnsupportedGuestError(
        f"the guest has {len(deployments)} OSTree deployments, and no boot entry that can be "
        "read here says which one boots",
        hint="is /boot on a disk of its own? Name it with --disk, use `vmprovision seed`, or "
        "remove all deployments but one with `ostree admin undeploy`",
    )


def _refuse_sealed(guest: GuestReader) -> None:
    """Raise an error unless the deployment keeps changes of ``/etc`` and ``/usr/local``.

    Raises:
        UnsupportedGuestError: it does not.
    """
    for path in PREPARE_ROOT:
        if _is_transient(read_text(guest, PurePosixPath(path)) or ""):
            raise UnsupportedGuestError(
                f"the guest recreates /etc at each boot, as {path} says",
                hint="put the agent into the tree that its commits are made from",
            )
    local = follow(guest, LOCAL)
    if local is not None and local.is_relative_to(USR):
        state = "is a part of" if status_of(guest, LOCAL) else "would be made in"
        raise UnsupportedGuestError(
            f"guest path {LOCAL} {state} /usr, which an OSTree deployment never changes",
            hint="make it a link to ../var/usrlocal in the tree that its commits are made from, "
            "or put the agent into that tree",
        )


def _is_transient(text: str) -> bool:
    """Return whether ostree-prepare-root's configuration has ``etc.transient``."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        parser.read_string(text)
        return parser.getboolean("etc", "transient", fallback=False)
    except (configparser.Error, ValueError):
        return False
