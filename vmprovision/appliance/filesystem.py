"""A mounted guest in an appliance, as a ``GuestFilesystem``.

Of a path that is given to the appliance no component but the last is a link, and that
one is not followed. Of libguestfs only calls that run inside the guest's root are used:
``write`` is one, ``tar_in`` is not (it follows an absolute link of the guest into the
appliance and reports success).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.appliance.answers import Content, Described, Listing
from vmprovision.appliance.handle import CHUNK, ApplianceCallError
from vmprovision.appliance.status_cache import StatusCache, may_hold
from vmprovision.errors import InspectionError
from vmprovision.filesystem.protocol import (
    PLAIN,
    ROOT,
    SELINUX,
    Attributes,
    FileStatus,
    LinkCircleError,
    apply_failure,
    follow,
    kind_of,
    resolve,
    valid_names,
)
from vmprovision.host.workspace import workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.appliance.answers import Part
    from vmprovision.appliance.protocol import Appliance
    from vmprovision.filesystem.protocol import FileKind

CONTENT_LIMIT = 32 << 10  # bytes of a file that is read with the listings
NAME_LIMIT = 255  # NAME_MAX of limits.h
LISTED_SIZE = 64 << 10  # bytes of a directory; a larger one is not listed for one name
ASKED_TOGETHER = 100  # if a directory has more entries, only the wanted one is read
# Of what most inspections read, all at once takes a fraction of the time of one by one.
USUAL = tuple(
    PurePosixPath(path)
    for path in (
        *("/", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/opt", "/proc", "/sbin", "/sys"),
        *("/boot/extlinux", "/boot/grub", "/boot/grub2", "/boot/loader", "/boot/loader/entries"),
        *("/etc/init.d", "/etc/selinux", "/etc/systemd", "/etc/systemd/system"),
        *("/usr", "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/libexec", "/usr/local", "/usr/sbin"),
        *("/usr/lib/systemd", "/usr/lib/systemd/system", "/usr/lib/systemd/system-preset"),
        *("/usr/local/bin", "/usr/local/lib", "/var", "/var/lib"),
        *("/usr/lib/systemd/system/graphical.target.wants", "/usr/lib/x86_64-linux-gnu"),
        "/etc/systemd/system/multi-user.target.wants",
        *("/etc/fstab", "/etc/os-release", "/usr/lib/os-release", "/etc/inittab"),
        *("/boot/extlinux/extlinux.conf", "/boot/grub/grub.cfg", "/etc/selinux/config"),
        *("/usr/lib/systemd/system/graphical.target", "/usr/lib/systemd/system/multi-user.target"),
    )
)
# In directories with many entries; with an asterisk, how the names begin.
USUAL_NAMES = (
    *("sh", "init", "systemd", "busybox", "python3*", "ld-*"),
    *("default.target", "graphical.target*", "multi-user.target*"),
)
_ABSENT = (errno.ENOENT, errno.ENOTDIR)


class ApplianceFilesystem:
    """The guest that is mounted in an appliance.

    It asks once for each status and again only after it has changed the file itself. Code
    that mounts or writes past it makes a new one, or reports that with ``mounted_on``.
    """

    def __init__(self, appliance: Appliance) -> None:
        """Take an appliance whose guest is mounted at ``/``."""
        self._appliance = appliance
        self._cache = StatusCache()
        self._has_listed = False

    def mounted_on(self, path: PurePosixPath) -> None:
        """Forget what was under a directory, a path without links: something is mounted on it."""
        self._cache.forget_below(path)

    def lstat(self, path: PurePosixPath) -> FileStatus | None:
        """Implement ``GuestFilesystem.lstat``."""
        _check_encodable(path)
        if path not in self._cache.statuses and not self._is_in_real_directory(path):
            try:
                path = resolve(self, path, last=False)
            except LinkCircleError:  # nothing can be there
                return None
        if path == ROOT and not self._has_listed:
            self._ask_for_listings(ROOT)
        if path not in self._cache.statuses:
            self._cache.statuses[path] = self._look_up(path)
        return self._cache.statuses[path]

    def _is_in_real_directory(self, path: PurePosixPath) -> bool:
        """Return whether a path is known to have no links among its parents."""
        above = self._cache.statuses.get(path.parent) if path.name != ".." else None
        return above is not None and above.kind == "directory"

    def _is_below_nothing(self, path: PurePosixPath) -> bool:
        """Return whether the nearest parent whose status is known is not a directory."""
        known = self._cache.statuses
        nearest = next((parent for parent in path.parents if parent in known), None)
        status = known[nearest] if nearest else None
        return nearest is not None and (status is None or status.kind != "directory")

    def _look_up(self, path: PurePosixPath) -> FileStatus | None:
        """Return the status of a path whose parents are not links; cache its siblings' as well.

        A name that its directory does not list needs no question.
        """
        folder = path.parent
        alone = path == ROOT or self._is_below_nothing(path)
        above = None if alone else self.lstat(folder)
        if path == ROOT or len(os.fsencode(path.name)) > NAME_LIMIT:
            return self._ask(path)
        if above is None or above.kind != "directory":
            return None
        if folder not in self._cache.names and above.size > LISTED_SIZE:
            return self._ask(path)
        try:
            names = self._list(folder)
        except InspectionError:  # damaged, or with more names than its size suggests
            return self._ask(path)
        if not may_hold(names, path.name):
            return None
        self._ask_all(folder, names if len(names) <= ASKED_TOGETHER else {path.name})
        known = self._cache.statuses.get(path)
        return known or self._ask(path)

    def _ask(self, path: PurePosixPath) -> FileStatus | None:
        try:
            (found,) = self._appliance.statuses(str(path.parent), [path.name or "."])
        except ApplianceCallError as exc:
            raise _unreadable(path, exc) from exc
        if isinstance(found, Described):
            self._keep_status(path, found)
            return self._cache.statuses[path]
        if found in _ABSENT:
            return None
        raise _unreadable(path, os.strerror(found))

    def _ask_all(self, folder: PurePosixPath, names: set[str]) -> None:
        """Cache the statuses of a directory's entries; unreadable ones stay unknown."""
        asked = [name for name in sorted(names) if folder / name not in self._cache.statuses]
        try:
            answers = self._appliance.statuses(str(folder), asked) if asked else []
        except ApplianceCallError as exc:
            raise _unreadable(folder, exc) from exc
        for name, found in zip(asked, answers, strict=True):
            if isinstance(found, Described):
                self._keep_status(folder / name, found)

    def _noted(self, path: PurePosixPath, found: Described) -> FileStatus:
        kind = kind_of(found.mode)
        if kind != "directory" and found.links != 1:
            self._cache.shared.add(path)
        return FileStatus(
            kind=kind,
            mode=stat.S_IMODE(found.mode),
            uid=found.uid,
            gid=found.gid,
            size=found.size,
            links=found.links,
        )

    def read(self, path: PurePosixPath, *, limit: int, offset: int = 0) -> bytes:
        """Implement ``GuestFilesystem.read``."""
        real = resolve(self, path)
        status = self.lstat(real)
        if status is None or status.kind != "file":
            raise InspectionError(f"guest path {path} is not a regular file")
        if (known := self._cache.contents.get(real)) is not None:
            return known[offset : offset + limit]
        parts: list[bytes] = []
        size = 0
        while (left := min(limit, status.size - offset) - size) > 0:
            try:
                part = self._appliance.read_file(str(real), offset + size, min(CHUNK, left))
            except ApplianceCallError as exc:
                raise _unreadable(path, exc) from exc
            if not part:
                break
            parts.append(part)
            size += len(part)
        content = b"".join(parts)
        if not offset and size >= status.size:
            self._cache.keep_content(real, content)
        return content

    def load(self, path: PurePosixPath, *, limit: int) -> tuple[FileStatus, bytes]:
        """Implement ``GuestFilesystem.load``; nothing else changes a guest that is off."""
        status = self.lstat(path)
        if status is None or status.kind != "file":
            raise InspectionError(f"guest path {path} is not a regular file")
        return status, self.read(path, limit=limit)

    def readlink(self, path: PurePosixPath) -> str:
        """Implement ``GuestFilesystem.readlink``."""
        here = resolve(self, path, last=False)
        if here not in self._cache.targets:
            try:
                target = self._appliance.read_link(str(here.parent), here.name).decode()
            except (ApplianceCallError, UnicodeDecodeError) as exc:
                raise _unreadable(path, exc) from exc
            if not target:
                raise InspectionError(f"guest path {path} is not a readable symbolic link")
            self._cache.targets[here] = target
        return self._cache.targets[here]

    def list_directory(self, path: PurePosixPath) -> list[str]:
        """Implement ``GuestFilesystem.list_directory``."""
        real = follow(self, path)
        status = self.lstat(real) if real else None
        if real is None or status is None or status.kind != "directory":
            return []
        return sorted(self._list(real))

    def _list(self, real: PurePosixPath) -> set[str]:
        """Return the names in a directory that are valid UTF-8."""
        if real not in self._cache.names:
            self._ask_for_listings(real)
        if real not in self._cache.names:
            try:
                found = self._appliance.call("readdir", str(real))
                names = [str(entry["name"]).encode() for entry in found]
            except UnicodeDecodeError:  # the binding decodes strictly; ls0 gives bytes
                names = self._raw_names(str(real))
            except ApplianceCallError as exc:
                raise _unreadable(real, exc) from exc
            self._cache.names[real] = set(valid_names(names)) - {".", ".."}
        return self._cache.names[real]

    def _ask_for_listings(self, real: PurePosixPath) -> None:
        """Cache what a directory holds; with the first one, what all usual places hold."""
        more = [path for path in USUAL if path != real] if not self._has_listed else []
        self._has_listed = True
        asked = [real, *more]
        found = self._appliance.entries(
            [str(path) for path in asked],
            known=ASKED_TOGETHER,
            wanted=USUAL_NAMES,
            limit=CONTENT_LIMIT,
        )
        for path, part in zip(asked, found, strict=True):
            self._keep_part(path, part)

    def _keep_part(self, path: PurePosixPath, part: Part) -> None:
        if isinstance(part, Content):
            self._keep_status(path, part.own)
            if len(part.content) == part.own.size:
                self._cache.keep_content(path, part.content)
        elif isinstance(part, Listing):
            self._cache.names[path] = set(valid_names(part.names))
            if part.own is not None:
                self._keep_status(path, part.own)
            for name in self._cache.names[path]:
                if described := part.entries.get(name.encode()):
                    self._keep_status(path / name, described)

    def _keep_status(self, path: PurePosixPath, described: Described) -> None:
        if path not in self._cache.statuses:
            self._cache.statuses[path] = self._noted(path, described)
        with contextlib.suppress(UnicodeDecodeError):
            if described.target:
                self._cache.targets[path] = described.target.decode()
        if described.label is not None:
            self._cache.labels[path] = _as_label(described.label) or None

    def _raw_names(self, real: str) -> list[bytes]:
        with workspace("names") as folder:
            listing = folder / "names"
            self._appliance.call("ls0", real, str(listing))
            return listing.read_bytes().split(b"\0")[:-1]

    def label(self, path: PurePosixPath) -> str | None:
        """Implement ``GuestFilesystem.label``."""
        real = resolve(self, path, last=False)
        if real not in self._cache.labels:
            try:
                found = self._appliance.read_label(str(real))
            except ApplianceCallError:
                return None  # a filesystem without labels
            self._cache.labels[real] = None if found is None else _as_label(found)
        return self._cache.labels[real]

    def takes_labels(self) -> bool:
        """Implement ``GuestFilesystem.takes_labels``."""
        try:
            self._appliance.call("lgetxattr", str(ROOT), SELINUX)
        except ApplianceCallError as exc:
            return exc.number == errno.ENODATA
        return True

    def write(self, path: PurePosixPath, content: bytes, attributes: Attributes = PLAIN) -> None:
        """Implement ``GuestFilesystem.write``."""
        self._make_way(path)
        self._make(path, "file", content, attributes, 0o644)

    def make_directory(self, path: PurePosixPath, attributes: Attributes = PLAIN) -> None:
        """Implement ``GuestFilesystem.make_directory``."""
        real = self._make(path, "directory", b"", attributes, 0o755)
        self._cache.names[real] = set()

    def symlink(self, path: PurePosixPath, target: str, attributes: Attributes = PLAIN) -> None:
        """Implement ``GuestFilesystem.symlink``."""
        self._make_way(path)
        with _applying(path):
            content = target.encode()
        self._make(path, "symlink", content, attributes, None)

    def _make(
        self,
        path: PurePosixPath,
        kind: FileKind,
        content: bytes,
        attributes: Attributes,
        mode: int | None,
    ) -> PurePosixPath:
        """Create what is not there, with this mode unless the attributes have one.

        Returns:
            The path without links.
        """
        wanted = replace(attributes, mode=mode if attributes.mode is None else attributes.mode)
        with self._changing(path) as real:
            made = self._appliance.make(str(real), kind, content, wanted)
        self._keep_status(real, made)
        return real

    def _make_way(self, path: PurePosixPath) -> None:
        """Remove the file or link at a path; its other names stay."""
        status = self.lstat(path)
        if status is None:
            return
        if status.kind == "directory":
            with _applying(path):
                raise ApplianceCallError("a directory is there", number=errno.EISDIR)
        self.remove(path)

    def remove(self, path: PurePosixPath) -> None:
        """Implement ``GuestFilesystem.remove``."""
        status = self.lstat(path)
        with self._changing(path, removing=True) as real:
            self._appliance.remove(str(real), status.kind if status else "other")

    def set_label(self, path: PurePosixPath, label: str) -> None:
        """Implement ``GuestFilesystem.set_label``."""
        with self._changing(path) as real:
            # the binding takes no NUL, and the kernel needs none
            self._appliance.call("lsetxattr", SELINUX, label, len(label.encode()), str(real))

    @contextlib.contextmanager
    def _changing(self, path: PurePosixPath, *, removing: bool = False) -> Iterator[PurePosixPath]:
        """Forget a guest path, given without links, when the block has changed it.

        After a failure forget everything. Later questions about the path, and about a
        directory from which it was removed, ask the guest again: verification sees what
        is there.
        """
        try:
            real = resolve(self, path, last=False)
        except InspectionError:  # the call itself says what is wrong
            real = path
        try:
            with _applying(path):
                yield real
        except BaseException:
            self._cache.clear()
            raise
        self._cache.forget(real)
        if removing:
            self._cache.names.pop(real.parent, None)
            self._cache.names.pop(real, None)
        elif real.parent in self._cache.names:
            self._cache.names[real.parent].add(real.name)


def _check_encodable(path: PurePosixPath) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as exc:  # a receipt may name what no guest can hold
        raise InspectionError(
            f"guest path {path} is not valid UTF-8", hint="the receipt that names it is damaged"
        ) from exc


def _as_label(raw: bytes) -> str:
    return bytes(raw).rstrip(b"\0").decode("utf-8", errors="replace")


def _unreadable(path: PurePosixPath, exc: Exception | str) -> InspectionError:
    return InspectionError(
        f"cannot read guest path {path}: {exc}", hint="check the guest's filesystem with fsck"
    )


@contextlib.contextmanager
def _applying(path: PurePosixPath) -> Iterator[None]:
    """Turn a failed call on a guest path into the error that names it."""
    try:
        yield
    except ApplianceCallError as exc:
        cause = os.strerror(exc.number) if exc.number else exc.message
        raise apply_failure(path, exc.number, cause) from exc
    except UnicodeEncodeError as exc:
        raise apply_failure(path, 0, "the name is not valid UTF-8") from exc
