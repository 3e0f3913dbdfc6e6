"""Read from a guest's files what it mounts while it boots; mount nothing.

``covering_mounts`` returns the mounts that cover given directories, from fstab(5),
systemd.mount(5), systemd.automount(5) and auto.master(5).
"""

from vmprovision.mounts.covering import Places, covering_mounts, innermost
from vmprovision.mounts.directory import find_hidden
from vmprovision.mounts.fstab import read_fstab
from vmprovision.mounts.guestmount import GuestMount, HiddenMount

__all__ = [
    "GuestMount",
    "HiddenMount",
    "Places",
    "covering_mounts",
    "find_hidden",
    "innermost",
    "read_fstab",
]
