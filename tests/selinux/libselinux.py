"""The host's own libselinux, asked for labels; SELinux need not be enabled for that."""

from __future__ import annotations

import ctypes
import ctypes.util
import stat
from typing import TYPE_CHECKING

from tests.conftest import require

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.selinux.filecontexts import LabelledKind

# selinux/label.h
_SELABEL_CTX_FILE = 0
_SELABEL_OPT_PATH = 3
MODES: dict[LabelledKind, int] = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
}


class _Option(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("value", ctypes.c_char_p))


class LibSELinux:
    """The rules in one ``file_contexts`` and beside it, as libselinux reads them."""

    def __init__(self, file_contexts: Path) -> None:
        """Open the rules; ``.homedirs``, ``.local`` and the substitutions are found by name."""
        name = ctypes.util.find_library("selinux")
        require(name, "libselinux is not installed")
        self._library = ctypes.CDLL(name, use_errno=True)
        self._library.selabel_open.restype = ctypes.c_void_p
        option = (_Option * 1)(_Option(_SELABEL_OPT_PATH, str(file_contexts).encode()))
        self._handle = ctypes.c_void_p(self._library.selabel_open(_SELABEL_CTX_FILE, option, 1))
        assert self._handle, f"libselinux does not read {file_contexts}"

    def label_for(self, path: str, kind: LabelledKind) -> str | None:
        """Return the label of a file of this kind at a path."""
        label = ctypes.c_char_p()
        failed = self._library.selabel_lookup_raw(
            self._handle, ctypes.byref(label), path.encode(), MODES[kind]
        )
        if failed:
            return None
        found = (label.value or b"").decode("ascii")
        self._library.freecon(label)
        return found

    def close(self) -> None:
        """Give back what the rules take."""
        self._library.selabel_close(self._handle)
        self._handle = ctypes.c_void_p()
