"""Read what the guest's boot loader passes to the kernel: the ``init=`` of the default entry.

Supported are GRUB's grub.cfg with every file that it sources; menu.lst of GRUB 0.9x;
syslinux(1) and extlinux; entries of the Boot Loader Specification with loader.conf(5)
and unified kernel images; LILO; the Raspberry Pi's firmware.

Only the default entry decides what process 1 is. If the default cannot be found and the
entries differ, or if something that may decide is not understood, the result is a
doubt. ``/etc/default/grub`` and ``/etc/kernel/cmdline`` are the sources of menus, and
count only if there is no menu.
"""

from __future__ import annotations

from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.inspection.bootmenu.files import (
    BootEntry,
    BootMenu,
    MenuFiles,
    NotUnderstoodError,
    init_option,
)
from vmprovision.inspection.bootmenu.grub import grub_menu
from vmprovision.inspection.bootmenu.loader import loader_menu
from vmprovision.inspection.bootmenu.tables import (
    command_line,
    firmware_line,
    grub_defaults,
    legacy_menu,
    lilo_menu,
    syslinux_menu,
    uboot_line,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmprovision.filesystem.protocol import GuestReader

__all__ = ["BootEntry", "BootMenu", "init_option", "named_subvolumes", "read_boot_menus"]

BOOT = PurePosixPath("/boot")
EFI = BOOT / "efi/EFI"
SYSLINUX = ("extlinux/extlinux.conf", "syslinux/syslinux.cfg", "extlinux.conf", "syslinux.cfg")
# file below /boot -> its parser
PARSERS: tuple[tuple[tuple[str, ...], Callable[[MenuFiles, PurePosixPath], BootMenu | None]], ...]
PARSERS = (
    (("grub/grub.cfg", "grub2/grub.cfg"), grub_menu),
    (("grub/menu.lst", "grub/grub.conf"), legacy_menu),
    (SYSLINUX, syslinux_menu),
    (("uEnv.txt", "armbianEnv.txt", "boot.cmd", "boot.scr"), uboot_line),
)
LOADER = tuple(PurePosixPath(path) for path in ("/boot/loader", "/boot/efi/loader", "/efi/loader"))
UNREAD_LIMIT = 3  # one is a doubt already
KERNEL_LINE = PurePosixPath("/etc/kernel/cmdline")

_Source = tuple[PurePosixPath, "Callable[[], BootMenu | None]"]


def read_boot_menus(reader: GuestReader, subvolume: str = "") -> list[BootMenu]:
    """Return the menus of all boot loaders in the guest, in use or not.

    Args:
        reader: the guest's files.
        subvolume: the btrfs subvolume that is the guest's root, if it is one.
    """
    files = MenuFiles(reader, subvolume)
    menus = _read(_sources(files))
    if menus:
        return menus
    made_from: list[_Source] = [
        (KERNEL_LINE, partial(command_line, files, KERNEL_LINE)),
        (PurePosixPath("/etc/default/grub"), partial(grub_defaults, files)),
    ]
    return _read(iter(made_from))


def named_subvolumes(
    reader: GuestReader, subvolume: str, is_elsewhere: Callable[[str], bool]
) -> set[str | None]:
    """Return the mount options by which the guest's menus name the subvolume of the root.

    Args:
        reader: the guest's files.
        subvolume: the btrfs subvolume whose files these are, if it is one.
        is_elsewhere: returns whether a value of ``root=`` means another filesystem.

    Returns:
        "" for an entry that names none, and None for one that may name any.
    """
    roots = {
        root
        for menu in read_boot_menus(reader, subvolume)
        for entry in menu.may_boot
        for root in entry.roots
    }
    return {
        root.subvolume
        for root in roots
        if (root.device or root.subvolume != "") and not is_elsewhere(root.device)
    }


def _sources(files: MenuFiles) -> Iterator[_Source]:
    """Yield each place of a menu with its parser, each real file once."""
    names = files.reader.list_directory(BOOT)
    paths = [
        (BOOT / path, parse)
        for group, parse in PARSERS
        for path in group
        if path.split("/")[0] in names
    ]
    if "efi" in names:
        vendors = files.reader.list_directory(EFI)
        paths += [(EFI / vendor / "grub.cfg", grub_menu) for vendor in vendors]
    paths.append((PurePosixPath("/extlinux.conf"), syslinux_menu))
    paths += [(PurePosixPath(f"/etc/{name}.conf"), lilo_menu) for name in ("lilo", "elilo")]
    seen = set()
    for path, parse in paths:
        real = files.real_path(path)
        if real is not None and real not in seen:
            seen.add(real)
            yield path, partial(parse, files, path)
    for folder in LOADER:
        yield folder, partial(loader_menu, files, folder)
    for folder in (BOOT / "firmware", BOOT):
        if folder.name in names or folder == BOOT:
            yield folder, partial(firmware_line, files, folder)


def _read(sources: Iterator[_Source]) -> list[BootMenu]:
    menus: list[BootMenu] = []
    unread = 0
    for path, read in sources:
        if unread >= UNREAD_LIMIT:
            break
        try:
            menu = read()
        except NotUnderstoodError as exc:
            menu = BootMenu(path=path, default=None, entries=(), unread=str(exc))
            unread += 1
        if menu and (menu.entries or menu.unread):
            menus.append(menu)
    return menus
