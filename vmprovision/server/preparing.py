"""Prepare a template: an injected copy of its image, and its boot files.

Each part is created beside its name and renamed when it is complete. So a killed server
leaves nothing that the next one would take for complete.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.drives import drive_of
from vmprovision.appliance.session import disk_sectors
from vmprovision.errors import (
    InspectionError,
    PlanError,
    ProofError,
    UnsupportedGuestError,
    about_image,
)
from vmprovision.image.disk import open_image
from vmprovision.image.diskfile import open_disk_file
from vmprovision.image.header import determine_format
from vmprovision.proof.bootsource import find_start
from vmprovision.reports import ImageOptions
from vmprovision.server.access import permitted_image
from vmprovision.server.files import (
    allow_qemu,
    copy_image,
    disk_failures,
    make_folder,
    remove_folder,
    sha256_of,
    template_folder,
)
from vmprovision.server.injecting import inject_image
from vmprovision.server.tools import Outcome
from vmprovision.target import Access, open_guest

if TYPE_CHECKING:
    from vmprovision.server.rows import TemplateRow
    from vmprovision.server.tools import Tools

IMAGE = "image"
BOOT = "boot"
BEGUN = ".injecting-"


def base_image(tools: Tools, template: TemplateRow) -> Path:
    """Return the prepared image of a template, the base of its VMs' disks."""
    return template_folder(tools.settings.state, template.id) / IMAGE


def prepare(tools: Tools, template: TemplateRow) -> Outcome:
    """Prepare the missing parts of a template.

    Raises:
        VmprovisionError: it cannot be prepared.
    """
    folder = template_folder(tools.settings.state, template.id)
    _begin(folder, template)
    source = permitted_image(template.rootfs_path, tools.settings.image_folders)
    with open_disk_file(source, write=False) as file:
        disk_format = determine_format(file, template.image_format)
    image = folder / IMAGE
    has_agent = template.has_agent
    if not image.exists():
        has_agent = _make_image(tools, template, source, image, disk_format)
    elif not has_agent:
        has_agent = not (folder / "without-agent").exists()
    boot = _find_boot(tools, image, disk_format, needs_guest=has_agent)
    owner = tools.qemu_owner()
    for path in (image, *(Path(boot[name]) for name in ("kernel", "initrd") if boot.get(name))):
        allow_qemu(path, owner)
    changes = {
        "state": "ready",
        "boot": boot,
        "has_agent": has_agent,
        "sha256": sha256_of(image),
        "error": None,
        "attempts": 0,
    }
    return Outcome(changes=changes)


def _begin(folder: Path, template: TemplateRow) -> None:
    """Make the folder of a template, without what was prepared from another image."""
    wanted = json.dumps([template.rootfs_path, template.image_format, template.agent])
    stamp = folder / "source.json"
    if not stamp.exists() or stamp.read_text("utf-8") != wanted:
        remove_folder(folder)
        make_folder(folder)
        with disk_failures(stamp):
            stamp.write_text(wanted, "utf-8")


def _make_image(
    tools: Tools, template: TemplateRow, source: Path, image: Path, disk_format: str
) -> bool:
    """Write the image of a template; return whether the agent is in it."""
    for begun in image.parent.glob(f"{BEGUN}*"):
        remove_folder(begun)
    with disk_failures(image):
        # a worker of a cluster may outlive the server, and must not meet the next one's file
        partial = Path(tempfile.mkdtemp(prefix=BEGUN, dir=image.parent))
    try:
        # a name without a suffix, so that the format stays
        inject_image(tools, source, source=ImageOptions(format=disk_format), output=partial / IMAGE)
    except (InspectionError, UnsupportedGuestError, PlanError):
        if template.agent == "required":
            raise
        (image.parent / "without-agent").touch()
        copy_image(source, image)
        return False
    else:
        (partial / IMAGE).replace(image)
        return True
    finally:
        remove_folder(partial)


def _find_boot(tools: Tools, image: Path, disk_format: str, *, needs_guest: bool) -> dict[str, Any]:
    """Return what a template's machines boot; store the guest's own kernel beside the image.

    Raises:
        VmprovisionError: the guest cannot be opened, or nothing in it boots.
    """
    boot: dict[str, Any] = {"format": disk_format, "arch": "x86_64", "sectors": 512}
    access = Access(source=ImageOptions(format=disk_format), pool=tools.pool, control=tools.control)
    partial = image.with_name(f".{BOOT}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o711)
    try:
        with (
            about_image(image),
            open_image(
                image, stated_format=disk_format, write=False, control=tools.control
            ) as opened,
            open_guest([drive_of(opened.layer, readonly=True)], access, write=False) as guest,
        ):
            start = find_start(guest, partial)
            boot |= {"arch": start.arch, "booted_by": start.name}
            boot["sectors"] = disk_sectors(guest.appliance)
    except (InspectionError, UnsupportedGuestError, ProofError):
        if needs_guest:
            raise
        return boot  # a guest that is not Linux can only boot by the firmware
    kept = image.with_name(BOOT)
    shutil.rmtree(kept, ignore_errors=True)
    partial.replace(kept)
    kept.chmod(0o711)
    source = start.source
    for key, path in (("kernel", source.kernel), ("initrd", source.initrd)):
        boot[key] = str(kept / path.name) if path else None
    boot["firmware"] = str(source.firmware) if source.firmware else None
    boot["command_line"] = source.command_line
    return boot


def remove_template(tools: Tools, template: TemplateRow) -> Outcome:
    """Remove the files of a template, before its row is deleted.

    Raises:
        OSError: a file cannot be removed.
    """
    remove_folder(template_folder(tools.settings.state, template.id))
    return Outcome(is_gone=True)
