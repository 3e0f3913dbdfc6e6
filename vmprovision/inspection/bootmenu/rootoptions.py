"""Read which filesystem, and which subvolume of btrfs, a kernel's command line has as its root.

``root=`` and ``rootflags=`` are options of the kernel (kernel-parameters.txt) and of every
initial RAM disk; ``subvol`` and ``subvolid`` are mount options of btrfs(5).
"""

from __future__ import annotations

from dataclasses import dataclass

WORD_LIMIT = 4096  # PATH_MAX; the limit of a kernel command line is lower
TOP_LEVEL = "subvolid=5"  # the number of the tree above all subvolumes
_SUBVOLUME = ("subvol", "subvolid")
_UNKNOWN = "\0"  # in a value of GRUB's: known only on the running machine


@dataclass(frozen=True, slots=True)
class RootOptions:
    """What a command line says of the root filesystem.

    Attributes:
        device: the value of ``root=``, or "".
        subvolume: the mount option that names the subvolume, as ``subvol=@`` or
            ``subvolid=256``; "" if none does, and None if that is not certain.
    """

    device: str
    subvolume: str | None


def root_options(line: str) -> RootOptions:
    """Return what a command line says of the root filesystem.

    Several ``rootflags=`` are a doubt if they differ: the kernel and most programs obey the
    last, and systemd-fstab-generator(8) joins all.
    """
    words = [word for word in line.split() if len(word) <= WORD_LIMIT]
    devices = [_value(word) for word in words if word.lstrip("\"'").startswith("root=")]
    flags = [_value(word) for word in words if word.lstrip("\"'").startswith("rootflags=")]
    last, joined = (_subvolume(each) for each in (flags[-1] if flags else "", ",".join(flags)))
    device = devices[-1] if devices else ""
    return RootOptions(
        device="" if _UNKNOWN in device else device,
        subvolume=last if last == joined else None,
    )


def _value(word: str) -> str:
    """Return the value of an option, without the quotes around either of them."""
    return word.strip("\"'").partition("=")[2].lstrip("\"'")


def _subvolume(flags: str) -> str | None:
    """Return the option of mount flags that names the subvolume; "" without one, None in doubt."""
    found: dict[str, str] = {}
    for flag in flags.split(","):
        name, _, value = flag.partition("=")
        if name in _SUBVOLUME:
            found[name] = value
    if any(_UNKNOWN in value or set("\"'") & set(value) for value in found.values()):
        return None
    named = [_plain(name, value) for name, value in found.items()]
    if len(named) > 1 or None in named:  # the kernel compares a path with a number
        return None
    return named[0] if named else ""


def _plain(name: str, value: str) -> str | None:
    """Return an option in the one form in which it is compared, or None if it is none."""
    if name == "subvol":
        path = value.strip("/")
        return f"subvol={path}" if path else TOP_LEVEL
    if not (value.isascii() and value.isdecimal()) or len(value) > len(str(1 << 64)):
        return None
    number = int(value)
    return f"subvolid={number}" if number else TOP_LEVEL
