"""The Protocol of every appliance, restored or stock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from vmprovision.appliance.handle import CALL_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from vmprovision.appliance.answers import Described, Part
    from vmprovision.appliance.drives import Drive
    from vmprovision.filesystem.protocol import Attributes, FileKind
    from vmprovision.progress import Control


class Appliance(Protocol):
    """A running appliance with disks; every call has a time limit and can be cancelled.

    One thread at a time uses an appliance; many appliances run side by side.
    """

    @property
    def has_volumes(self) -> bool:
        """Whether udev, RAID and LVM run in it."""

    def call(self, name: str, *arguments: Any, limit: float = CALL_SECONDS, **options: Any) -> Any:  # noqa: ANN401 -- untyped library
        """Return the result of one libguestfs API call; see ``Handle.call``."""

    def mount(
        self, device: str, driver: str, place: str, *, readonly: bool, options: str = ""
    ) -> None:
        """Mount a filesystem of the guest without writing access times.

        Args:
            device: its node in the appliance.
            driver: the kernel's filesystem.
            place: a directory of the guest, free of links.
            readonly: do not write to it.
            options: the filesystem's own mount options.

        Raises:
            ApplianceCallError: it cannot be mounted.
        """

    def look(
        self, device: str, driver: str, names: Iterable[str], options: str = ""
    ) -> set[str] | None:
        """Return which names are in the root directory of a filesystem that is not mounted.

        None if this appliance cannot tell.

        Raises:
            ApplianceCallError: the filesystem cannot be mounted or read.
        """

    def read_device(self, device: str, place: int, size: int) -> bytes:
        """Return bytes of a disk, a partition or a logical volume; fewer at its end.

        Raises:
            ApplianceCallError: they cannot be read.
        """

    def entries(
        self, places: Sequence[str], *, known: int, wanted: Sequence[str], limit: int
    ) -> list[Part]:
        """Return what directories and small files of the guest hold, all with one question.

        Args:
            places: their paths in the guest, free of links.
            known: in a directory with more entries than this, only some are described,
            wanted: and these are their names, or with an asterisk how they begin.
            limit: the bytes of the largest file whose content is returned.

        Returns:
            An errno for each that cannot be read in this way.
        """

    def statuses(self, folder: str, names: Sequence[str]) -> list[Described | int]:
        """Return the statuses of names in a directory of the guest, or the errno of each failure.

        Args:
            folder: its path in the guest, free of links.
            names: which, or ``.`` for the directory itself.

        Raises:
            ApplianceCallError: the directory cannot be read.
        """

    def read_link(self, folder: str, name: str) -> bytes:
        """Return where a symbolic link of the guest leads.

        Raises:
            ApplianceCallError: it cannot be read, or is no link.
        """

    def read_label(self, place: str) -> bytes | None:
        """Return the SELinux label of a file of the guest, or None if it has none.

        Raises:
            ApplianceCallError: the filesystem has no labels.
        """

    def read_file(self, path: str, place: int, size: int) -> bytes:
        """Return bytes of a regular file of the guest, fewer behind its end.

        Args:
            path: its path in the guest, free of links.
            place: the first byte.
            size: how many.

        Raises:
            ApplianceCallError: they cannot be read; ``number`` carries the errno.
        """

    def is_sealed(self, place: str) -> bool:
        """Return whether a directory of the guest is a read-only subvolume of btrfs.

        Raises:
            ApplianceCallError: it is no subvolume.
        """

    def make(self, place: str, kind: FileKind, content: bytes, attributes: Attributes) -> Described:
        """Create a file, directory or symbolic link in the guest; return its status.

        Args:
            place: its path in the guest, whose parents are free of links.
            kind: what to create.
            content: of a file, or where a link leads.
            attributes: with a mode, unless it is a link.

        Raises:
            ApplianceCallError: it cannot be created; ``number`` carries the errno.
        """

    def remove(self, place: str, kind: FileKind) -> None:
        """Remove a file, a link or an empty directory of the guest.

        Args:
            place: its path in the guest, whose parents are free of links.
            kind: what it is.

        Raises:
            ApplianceCallError: it cannot be removed; ``number`` carries the errno.
        """

    def unmount(self, place: str | None = None) -> None:
        """Unmount what is at a place of the guest, or all of the guest.

        Raises:
            ApplianceError: something is still in use.
        """

    def map_devices(self, table: str, links: Sequence[str]) -> None:
        """Make the guest's logical volumes, unless LVM has made them.

        Args:
            table: the device-mapper table, in the concise form of dmsetup(8).
            links: the name below ``/dev`` for each device of the table.

        Raises:
            ApplianceCallError: a volume cannot be created.
        """

    def activate_volumes(self) -> None:
        """Start udev, RAID, LVM and dynamic disks, unless they run.

        Raises:
            ApplianceError: they cannot be started.
        """

    def before_detaching(self, close: Callable[[], None]) -> None:
        """Register a call for the time when the guest is unmounted and its disks are attached."""

    def finish(self) -> None:
        """Unmount the guest; afterwards the disks' files hold all that was written, and no more is.

        Raises:
            ApplianceError: a write did not reach its disk.
        """

    def raise_host_fault(self, exc: Exception) -> None:
        """Raise the host's fault, if one made the guest's operation fail.

        Args:
            exc: what failed.

        Raises:
            ImageError: QEMU could not read or write a file of the host.
            ApplianceTimeoutError: the watchdog ended QEMU.
            CancelledError: the caller cancelled.
        """

    def close(self) -> None:
        """End the machine and remove what it left on the host."""


class Appliances(Protocol):
    """A source of appliances; ``open_appliance`` is the simplest."""

    def open(
        self, drives: Sequence[Drive], *, control: Control
    ) -> AbstractContextManager[Appliance]:
        """Give a running appliance with these drives, in their order."""
