"""Read the Boot Loader Specification's entries, loader.conf(5) and unified kernel images."""

from __future__ import annotations

import fnmatch
import struct
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.inspection.bootmenu.files import (
    ENTRY_LIMIT,
    BootEntry,
    BootMenu,
    NotUnderstoodError,
    entry_of,
    keyword,
    lines_in_force,
    settings,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vmprovision.inspection.bootmenu.files import MenuFiles

GRUBENVS = tuple(PurePosixPath(f"/boot/{name}/grubenv") for name in ("grub2", "grub"))
COMMAND_LINE_LIMIT = 16 << 10
PATTERN_LIMIT = 255
SECTIONS_LIMIT = 96  # bytes of an entry of the PE section table
_HEADER = 4096
_SECTION = 40


def loader_menu(files: MenuFiles, folder: PurePosixPath) -> BootMenu | None:
    """Return the entries below a ``loader`` directory, with the default of GRUB or systemd-boot.

    Unified kernel images on the same partition are entries too.
    """
    place = folder / "entries"
    environment: dict[str, str] = {}
    for path in GRUBENVS:
        environment |= settings(files.text(path))
    entries = [
        *_described(files, place, environment),
        *_images(files, folder.parent / "EFI/Linux"),
    ]
    if not entries:
        return None
    pattern = settings(files.text(folder / "loader.conf")).get("default", "")[:PATTERN_LIMIT]
    saved = environment.get("saved_entry")
    chosen = [
        entry
        for entry in entries
        if _matches(entry.name, pattern) or (saved and saved in (entry.name, entry.title))
    ]
    default = chosen[0] if len(chosen) == 1 else None
    return BootMenu(path=place, default=default, entries=tuple(entries))


def _matches(name: str, pattern: str) -> bool:
    """Return whether loader.conf's pattern matches an entry; adjacent asterisks count as one."""
    while "**" in pattern:
        pattern = pattern.replace("**", "*")
    files = (name, f"{name}.conf", f"{name}.efi")
    return any(fnmatch.fnmatchcase(file, pattern) for file in files)


def _described(
    files: MenuFiles, place: PurePosixPath, environment: Mapping[str, str]
) -> list[BootEntry]:
    names = [name for name in files.reader.list_directory(place) if name.endswith(".conf")]
    if len(names) > ENTRY_LIMIT:
        raise NotUnderstoodError(f"{place} holds more than {ENTRY_LIMIT} entries")
    entries = []
    for name in names:
        lines = [keyword(line) for line in lines_in_force(files.text(place / name))]
        if not {"linux", "options"} & {word for word, _ in lines}:
            continue  # not Linux: a memory test, a firmware shell
        options = " ".join(value for word, value in lines if word == "options")
        for variable in ("kernelopts", "tuned_params"):
            options = options.replace(f"${variable}", environment.get(variable, ""))
        said = dict(reversed(lines))  # the first line of a kind counts
        entry = entry_of(said.get("title", name), options, name=name.removesuffix(".conf"))
        kernel, initrd = said.get("linux", ""), said.get("initrd", "")
        entries.append(replace(entry, kernel=kernel, initrd=initrd, options=options))
    return entries


def _images(files: MenuFiles, place: PurePosixPath) -> list[BootEntry]:
    """Return the unified kernel images in a directory, with the command line inside each."""
    names = [name for name in files.reader.list_directory(place) if name.lower().endswith(".efi")]
    if len(names) > ENTRY_LIMIT:
        raise NotUnderstoodError(f"{place} holds more than {ENTRY_LIMIT} images")
    entries = []
    for name in names:
        line = _embedded_line(files, place / name)
        if line is not None:
            title = name[: -len(".efi")]
            entries.append(entry_of(title, line, name=title))
    return entries


def _embedded_line(files: MenuFiles, path: PurePosixPath) -> str | None:
    """Return the ``.cmdline`` section of a PE file, or None if the file has none."""
    real = files.real_path(path)
    head = files.reader.read(real, limit=_HEADER) if real else b""
    if real is None or len(head) < 64 or head[:2] != b"MZ":  # noqa: PLR2004 -- a DOS header
        return None
    (start,) = struct.unpack_from("<I", head, 60)
    head = files.reader.read(real, limit=_HEADER + SECTIONS_LIMIT * _SECTION, offset=start)
    if head[:4] != b"PE\0\0" or len(head) < 24:  # noqa: PLR2004 -- signature and COFF header
        return None
    count, optional = struct.unpack_from("<H", head, 6)[0], struct.unpack_from("<H", head, 20)[0]
    for number in range(min(count, SECTIONS_LIMIT)):
        section = head[24 + optional + number * _SECTION :][:_SECTION]
        if len(section) == _SECTION and section[:8].rstrip(b"\0") == b".cmdline":
            size, offset = (
                struct.unpack_from("<I", section, 8)[0],
                struct.unpack_from("<I", section, 20)[0],
            )
            if size > COMMAND_LINE_LIMIT:
                raise NotUnderstoodError(f"{path} holds a command line of {size} bytes")
            content = files.reader.read(real, limit=size, offset=offset)
            return content.rstrip(b"\0\n").decode("utf-8", errors="replace")
    return ""
