"""What a guest mounts while it boots, by its own files; nothing is mounted here.

``covering_mounts`` is the way in: the mounts under which directories that matter lie,
from fstab(5), systemd.mount(5), systemd.automount(5) and auto.master(5).
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
