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
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.appliance.session import ApplianceCallError
from vmprovision.errors import InspectionError
from vmprovision.filesystem import (
    ROOT,
    SELINUX,
    FileStatus,
    apply_failure,
    kind_of,
    resolve,
    valid_names,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import PurePosixPath

    from vmprovision.appliance.session import Appliance

CHUNK = 2 << 20  # libguestfs's messages hold 4 MiB
_ABSENT = (errno.ENOENT, errno.ENOTDIR)


class ApplianceFilesystem:
    """The guest that is mounted in an appliance."""

    def __init__(self, appliance: Appliance) -> None:
        """Take an appliance whose guest is mounted at ``/``."""
        self._appliance = appliance

    def lstat(self, path: PurePosixPath) -> FileStatus | None:
        """As the Protocol has it."""
        try:
            found = self._appliance.call("lstatns", str(path))
        except ApplianceCallError as exc:
            if exc.number in _ABSENT:
                return None
            raise _unreadable(path, exc) from exc
        except UnicodeEncodeError as exc:  # a receipt can name what no guest can hold
            raise InspectionError(
                f"guest path {path} is not valid UTF-8", hint="who wrote the receipt that names it?"
            ) from exc
        mode = int(found["st_mode"])
        return FileStatus(
            kind=kind_of(mode),
            mode=stat.S_IMODE(mode),
            uid=int(found["st_uid"]),
            gid=int(found["st_gid"]),
            size=int(found["st_size"]),
        )

    def read(self, path: PurePosixPath, *, limit: int, offset: int = 0) -> bytes:
        """As the Protocol has it."""
        real = resolve(self, path)
        status = self.lstat(real)
        if status is None or status.kind != "file":
            raise InspectionError(f"guest path {path} is not a regular file")
        parts: list[bytes] = []
        size = 0
        while size < limit:
            try:
                part = self._appliance.call(
                    "pread", str(real), min(CHUNK, limit - size), offset + size
                )
            except ApplianceCallError as exc:
                raise _unreadable(path, exc) from exc
            if not part:
                break
            parts.append(part)
            size += len(part)
        return b"".join(parts)

    def readlink(self, path: PurePosixPath) -> str:
        """As the Protocol has it."""
        try:
            return str(self._appliance.call("readlink", str(path)))
        except (ApplianceCallError, UnicodeDecodeError) as exc:
            raise _unreadable(path, exc) from exc

    def list_directory(self, path: PurePosixPath) -> list[str]:
        """As the Protocol has it."""
        real = str(resolve(self, path))
        try:
            found = self._appliance.call("readdir", real)
            names = [str(entry["name"]).encode() for entry in found]
        except UnicodeDecodeError:  # the binding decodes strictly; ls0 gives bytes
            names = self._raw_names(real)
        except ApplianceCallError as exc:
            if exc.number in _ABSENT:
                return []
            raise _unreadable(path, exc) from exc
        return [name for name in valid_names(names) if name not in (".", "..")]

    def _raw_names(self, real: str) -> list[bytes]:
        with tempfile.TemporaryDirectory(prefix="vmprovision-") as folder:
            listing = Path(folder) / "names"
            self._appliance.call("ls0", real, str(listing))
            return listing.read_bytes().split(b"\0")[:-1]

    def label(self, path: PurePosixPath) -> str | None:
        """As the Protocol has it."""
        try:
            raw = self._appliance.call("lgetxattr", str(path), SELINUX)
        except ApplianceCallError:
            return None  # no label, or a filesystem that has none
        return bytes(raw).rstrip(b"\0").decode("utf-8", errors="replace")

    def takes_labels(self) -> bool:
        """As the Protocol has it."""
        try:
            self._appliance.call("lgetxattr", str(ROOT), SELINUX)
        except ApplianceCallError as exc:
            return exc.number == errno.ENODATA
        return True

    def write(self, path: PurePosixPath, content: bytes) -> None:
        """As the Protocol has it."""
        status = self.lstat(path)
        with _applying(path):
            if status is not None and status.kind != "file":
                raise ApplianceCallError(f"a {status.kind} is there", number=errno.EEXIST)
            self._appliance.call("write", str(path), content[:CHUNK])
            for start in range(CHUNK, len(content), CHUNK):
                self._appliance.call("write_append", str(path), content[start : start + CHUNK])

    def make_directory(self, path: PurePosixPath) -> None:
        """As the Protocol has it."""
        with _applying(path):
            self._appliance.call("mkdir", str(path))

    def symlink(self, path: PurePosixPath, target: str) -> None:
        """As the Protocol has it.

        Alone of the calls used here, ``ln_s`` runs a program outside the guest's
        root: through an absolute link among the path's parents it would make its
        link in the appliance, and report success.
        """
        real = resolve(self, path.parent) / path.name
        with _applying(path):
            self._appliance.call("ln_s", target, str(real))

    def remove(self, path: PurePosixPath) -> None:
        """As the Protocol has it."""
        status = self.lstat(path)
        with _applying(path):
            name = "rmdir" if status is not None and status.kind == "directory" else "rm"
            self._appliance.call(name, str(path))

    def set_mode(self, path: PurePosixPath, mode: int) -> None:
        """As the Protocol has it."""
        with _applying(path):
            self._appliance.call("chmod", mode, str(path))

    def set_owner(self, path: PurePosixPath, uid: int, gid: int) -> None:
        """As the Protocol has it."""
        with _applying(path):
            self._appliance.call("lchown", uid, gid, str(path))

    def set_label(self, path: PurePosixPath, label: str) -> None:
        """As the Protocol has it."""
        with _applying(path):  # the binding takes no NUL, and the kernel needs none
            self._appliance.call("lsetxattr", SELINUX, label, len(label.encode()), str(path))


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
