"""A mount that a guest's own files declare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import PurePosixPath

NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "glusterfs", "lustre", "afs", "ncpfs"),
    *("9p", "virtiofs", "vboxsf", "vmhgfs", "sshfs", "davfs"),
)
# Types that are empty at each boot, or are assembled from other places.
MADE_AT_BOOT = ("tmpfs", "ramfs", "overlay", "overlayfs", "aufs", "devtmpfs", "zram")
AUTOMOUNT = "x-systemd.automount"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestMount:
    """A filesystem that the guest mounts while it boots, or at the first access.

    Attributes:
        source: what is mounted, as the guest names it.
        mountpoint: the directory, as the guest names it.
        place: the mountpoint's real path.
        kind: the filesystem's type; ``auto`` if the guest leaves it open.
        options: the mount options.
        origin: the declaration in the guest: ``line 3 of /etc/fstab``.
    """

    source: str
    mountpoint: PurePosixPath
    place: PurePosixPath
    kind: str
    options: tuple[str, ...]
    origin: str

    @property
    def is_bind(self) -> bool:
        """Whether it shows another directory of the guest."""
        return self.kind == "bind" or not {"bind", "rbind"}.isdisjoint(self.options)

    @property
    def is_device(self) -> bool:
        """Whether the source may be a block device, which an image may hold."""
        pseudo = self.kind in (*NETWORK, *MADE_AT_BOOT, "autofs", "zfs") or "fuse" in self.kind
        named = self.source.startswith("/dev/") or "=" in self.source.partition("/")[0]
        return named and not pseudo and not self.is_bind and "loop" not in self.options

    @property
    def at_boot(self) -> bool:
        """Whether it is mounted when services start.

        ``noauto`` prevents that, except for ``/usr`` and for mounts with
        ``x-initrd.mount``, which the initramfs mounts.
        """
        early = str(self.place) == "/usr" or "x-initrd.mount" in self.options
        return early or AUTOMOUNT in self.options or "noauto" not in self.options

    @property
    def sentence(self) -> str:
        """A sentence with source, mountpoint and origin."""
        return f"the guest mounts {self.source} on {self.mountpoint} ({self.origin})"

    @property
    def obstacle(self) -> str:
        """Why it cannot be mounted here, as the end of a sentence."""
        if self.is_bind:
            return "a bind mount is not followed"
        if self.kind in MADE_AT_BOOT:
            return f"a {self.kind} is empty at each boot"
        return "the image has no such device" if self.is_device else "that is not in the image"

    @property
    def advice(self) -> str:
        """The hint for installing the agent in such a guest."""
        if self.is_bind:
            first = "replace the bind mount by a symbolic link, which is followed"
        elif self.kind in MADE_AT_BOOT:
            first = "remove that mount from the guest: it is empty at each boot"
        elif self.is_device:
            first = "remove that mount from the guest if it is stale"
        else:
            first = "remove that mount from the guest"
        return f"{first}, or run `guest-agent install` inside the running guest"


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenMount:
    """A mount of the guest that is not mounted here, so that it would hide what is written.

    Attributes:
        mount: the guest's mount.
        why: why it is not mounted, as the end of a sentence.
    """

    mount: GuestMount
    why: str

    @property
    def sentence(self) -> str:
        """A sentence with the mount and why it is not mounted here."""
        return f"{self.mount.sentence}; {self.why}"
