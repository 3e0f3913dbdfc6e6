"""A mounted guest in an appliance, as a ``GuestFilesystem``.

Only calls that libguestfs runs inside the guest's root are used: ``write`` is
one, ``tar_in`` is not (it follows an absolute link of the guest into the
appliance and reports success).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from vmprovision.appliance.listings import Described
from vmprovision.appliance.session import ApplianceCallError
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
    from collections.abc import Iterator, Mapping

    from vmprovision.appliance.listings import Listing
    from vmprovision.appliance.session import Appliance

CHUNK = 2 << 20  # a message of libguestfs has at most 4 MiB
NAME_LIMIT = 255  # NAME_MAX of limits.h
LISTED_SIZE = 64 << 10  # bytes of a directory; a larger one is not listed for one name
ASKED_TOGETHER = 100  # if a directory has more entries, only the wanted one is read
# Directories of which most inspections read some. All at once take half the time of one by one.
USUAL = tuple(
    PurePosixPath(path)
    for path in (
        *("/", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/opt", "/proc", "/sbin", "/sys"),
        *("/boot/extlinux", "/boot/grub", "/boot/grub2", "/boot/loader", "/boot/loader/entries"),
        *("/etc/init.d", "/etc/selinux", "/etc/systemd", "/etc/systemd/system"),
        *("/usr", "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/libexec", "/usr/local", "/usr/sbin"),
        *("/usr/lib/systemd", "/usr/lib/systemd/system", "/usr/lib/systemd/system-preset"),
        *("/usr/local/bin", "/usr/local/lib", "/var", "/var/lib"),
        "/etc/systemd/system/multi-user.target.wants",
    )
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
            found = self._appliance.call("lstatns", str(path))
        except ApplianceCallError as exc:
            if exc.number in _ABSENT:
                return None
            raise _unreadable(path, exc) from exc
        return self._noted(path, _described(found))

    def _ask_all(self, folder: PurePosixPath, names: set[str]) -> None:
        """Cache the statuses of a directory's entries; unreadable ones stay unknown."""
        asked = [name for name in sorted(names) if folder / name not in self._cache.statuses]
        try:
            answers = self._appliance.call("lstatnslist", str(folder), asked)
        except ApplianceCallError as exc:
            raise _unreadable(folder, exc) from exc
        for name, found in zip(asked, answers, strict=True):
            if found["st_ino"] != -1:
                path = folder / name
                self._cache.statuses[path] = self._noted(path, _described(found))

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
            try:  # unlike `readlink`, this starts no process
                found = self._appliance.call("readlinklist", str(here.parent), [here.name])
            except (ApplianceCallError, UnicodeDecodeError) as exc:
                raise _unreadable(path, exc) from exc
            if not found[0]:
                raise InspectionError(f"guest path {path} is not a readable symbolic link")
            self._cache.targets[here] = str(found[0])
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
        """Cache what a directory holds; with the first one, what all usual ones hold."""
        more = [path for path in USUAL if path != real] if not self._has_listed else []
        self._has_listed = True
        asked = [real, *more]
        found = self._appliance.list_directories([str(path) for path in asked], ASKED_TOGETHER)
        for path, listing in zip(asked, found, strict=True):
            if listing is not None:
                self._keep_listing(path, listing)

    def _keep_listing(self, folder: PurePosixPath, listing: Listing) -> None:
        self._cache.names[folder] = set(valid_names(listing.names))
        if listing.own is not None:
            self._keep_status(folder, listing.own)
        for name in self._cache.names[folder]:
            if described := listing.entries.get(name.encode()):
                self._keep_status(folder / name, described)

    def _keep_status(self, path: PurePosixPath, described: Described) -> None:
        if path not in self._cache.statuses:
            self._cache.statuses[path] = self._noted(path, described)
        with contextlib.suppress(UnicodeDecodeError):
            if described.target:
                self._cache.targets[path] = described.target.decode()

    def _raw_names(self, real: str) -> list[bytes]:
        with workspace("names") as folder:
            listing = folder / "names"
            self._appliance.call("ls0", real, str(listing))
            return listing.read_bytes().split(b"\0")[:-1]

    def label(self, path: PurePosixPath) -> str | None:
        """Implement ``GuestFilesystem.label``."""
        try:
            # an answer without it is cheaper than an error
            found = self._appliance.call("lgetxattrs", str(path))
            raw = next((each["attrval"] for each in found if each["attrname"] == SELINUX), None)
        except UnicodeDecodeError:  # in the name of another attribute
            raw = self._label_alone(path)
        except ApplianceCallError:
            return None  # a filesystem without labels
        return None if raw is None else _as_label(raw)

    def _label_alone(self, path: PurePosixPath) -> bytes | None:
        try:
            return bytes(self._appliance.call("lgetxattr", str(path), SELINUX))
        except ApplianceCallError:
            return None

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
        with self._changing(path):
            self._appliance.call("write", str(path), content[:CHUNK])
            for start in range(CHUNK, len(content), CHUNK):
                self._appliance.call("write_append", str(path), content[start : start + CHUNK])
        self._dress(path, attributes, 0o644)

    def make_directory(self, path: PurePosixPath, attributes: Attributes = PLAIN) -> None:
        """Implement ``GuestFilesystem.make_directory``."""
        with self._changing(path) as real:
            self._appliance.call("mkdir", str(path))
        self._cache.names[real] = set()
        self._dress(path, attributes, 0o755)

    def symlink(self, path: PurePosixPath, target: str, attributes: Attributes = PLAIN) -> None:
        """Implement ``GuestFilesystem.symlink``.

        Of the calls used here, only this one works outside of the guest's root. An absolute
        link among the path's parents would lead it into the appliance, and it would report
        success.
        """
        self._make_way(path)
        real = resolve(self, path.parent) / path.name
        with self._changing(path):
            self._appliance.symlink(target, str(real))
        self._dress(path, attributes, None)

    def _make_way(self, path: PurePosixPath) -> None:
        """Remove the file or link at a path; its other names stay."""
        status = self.lstat(path)
        if status is None:
            return
        if status.kind == "directory":
            with _applying(path):
                raise ApplianceCallError("a directory is there", number=errno.EISDIR)
        self.remove(path)

    def _dress(self, path: PurePosixPath, attributes: Attributes, mode: int | None) -> None:
        """Give a new file its owner, mode and label, unless it has them.

        The owner comes first: changing it clears the set-user-id and set-group-id bits.
        """
        made = self.lstat(path)
        if made is None or (made.uid, made.gid) != (attributes.uid, attributes.gid):
            with self._changing(path):
                self._appliance.call("lchown", attributes.uid, attributes.gid, str(path))
        if mode is not None:
            wanted = mode if attributes.mode is None else attributes.mode
            made = self.lstat(path)
            if made is None or made.mode != wanted:
                with self._changing(path):
                    self._appliance.call("chmod", wanted, str(path))
        if attributes.label is not None:
            self.set_label(path, attributes.label)

    def remove(self, path: PurePosixPath) -> None:
        """Implement ``GuestFilesystem.remove``."""
        status = self.lstat(path)
        with self._changing(path, removing=True):
            name = "rmdir" if status is not None and status.kind == "directory" else "rm"
            self._appliance.call(name, str(path))

    def set_label(self, path: PurePosixPath, label: str) -> None:
        """Implement ``GuestFilesystem.set_label``."""
        with _applying(path):  # the binding takes no NUL, and the kernel needs none
            self._appliance.call("lsetxattr", SELINUX, label, len(label.encode()), str(path))

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


def _described(found: Mapping[str, int]) -> Described:
    """Return a status of libguestfs."""
    return Described(
        mode=int(found["st_mode"]),
        links=int(found["st_nlink"]),
        uid=int(found["st_uid"]),
        gid=int(found["st_gid"]),
        size=int(found["st_size"]),
    )


def _check_encodable(path: PurePosixPath) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as exc:  # a receipt may name what no guest can hold
        raise InspectionError(
            f"guest path {path} is not valid UTF-8", hint="the receipt that names it is damaged"
        ) from exc


def _as_label(raw: bytes) -> str:
    return bytes(raw).rstrip(b"\0").decode("utf-8", errors="replace")


def _unreadable(path: PurePosixPath, exc: Exception) -> InspectionError:
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
