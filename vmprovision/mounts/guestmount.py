"""One mount that a guest's own files declare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import PurePosixPath

NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "glusterfs", "lustre", "afs", "ncpfs"),
    *("9p", "virtiofs", "vboxsf", "vmhgfs", "sshfs", "davfs"),
)
# What is empty at each boot, or is put together from other places.
MADE_AT_BOOT = ("tmpfs", "ramfs", "overlay", "overlayfs", "aufs", "devtmpfs", "zram")
AUTOMOUNT = "x-systemd.automount"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestMount:
    """A filesystem that the guest mounts while it boots, or at the first access.

    Attributes:
        source: what is mounted, as the guest names it.
        mountpoint: where, as the guest names it.
        place: where that is with every link followed.
        kind: the filesystem's type; ``auto`` where the guest leaves it open.
        options: of the mount.
        origin: where the guest says so: ``line 3 of /etc/fstab``.
    """

    source: str
    mountpoint: PurePosixPath
    place: PurePosixPath
    kind: str
    options: tuple[str, ...]
    origin: str

    @property
    def is_bind(self) -> bool:
        """Whether another directory of the guest is shown there."""
        return self.kind == "bind" or not {"bind", "rbind"}.isdisjoint(self.options)

    @property
    def is_device(self) -> bool:
        """Whether what is mounted may be a device, which an image may hold."""
        pseudo = self.kind in (*NETWORK, *MADE_AT_BOOT, "autofs", "zfs") or "fuse" in self.kind
        named = self.source.startswith("/dev/") or "=" in self.source.partition("/")[0]
        return named and not pseudo and not self.is_bind and "loop" not in self.options

    @property
    def at_boot(self) -> bool:
        """Whether it is there when services start: fstab's ``noauto`` leaves it to a person.

        An initramfs mounts ``/usr``, and what has the option ``x-initrd.mount``, all the same.
        """
        early = str(self.place) == "/usr" or "x-initrd.mount" in self.options
        return early or AUTOMOUNT in self.options or "noauto" not in self.options

    @property
    def sentence(self) -> str:
        """What is mounted where, and which file says so."""
        return f"the guest mounts {self.source} on {self.mountpoint} ({self.origin})"

    @property
    def obstacle(self) -> str:
        """Why it cannot be mounted here, as the end of a sentence."""
        if self.is_bind:
            return "a bind mount is not followed"
        if self.kind in MADE_AT_BOOT:
            return f"a {self.kind} is made anew at each boot"
        return "the image has no such device" if self.is_device else "that is not in the image"

    @property
    def advice(self) -> str:
        """How to get the agent into such a guest."""
        if self.is_bind:
            first = "replace the bind mount by a symbolic link, which is followed"
        elif self.kind in MADE_AT_BOOT:
            first = "take that mount out of the guest: what it shows is made anew at each boot"
        elif self.is_device:
            first = "take that mount out of the guest if it is stale"
        else:
            first = "take that mount out of the guest"
        return f"{first}, or run `guest-agent install` inside the running guest"


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenMount:
    """A mount of the guest that is not mounted while we work: it hides what is written there.

    Attributes:
        why: it is not mounted, as the end of a sentence.
    """

    mount: GuestMount
    why: str

    @property
    def sentence(self) -> str:
        """What is mounted where in the guest, and why it is not here."""
        return f"{self.mount.sentence}; {self.why}"
