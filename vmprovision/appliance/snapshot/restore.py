"""A saved appliance that runs again, from one image to the next.

libguestfs starts the saved appliance's own program in place of QEMU; that connects
to a monitor and an attendant's socket in a folder of this session.  While libguestfs
waits for its daemon, a thread loads the state, lets the machine run, sets its clock
and its random generator, and plugs in the disks.  Nothing of libguestfs's protocol
is touched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shlex
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmprovision.appliance.drives import (
    TELL_FAILURES,
    WrongDiskError,
    device_name,
    new_serial,
    raise_disk_failure,
    require_disk,
    throwaway,
)
from vmprovision.appliance.library import Handle, launch_failure
from vmprovision.appliance.snapshot.hardware import (
    ATTENDANT,
    IGNORE_SHARED,
    MONITOR,
    SPECIAL,
)
from vmprovision.appliance.snapshot.store import UnusableApplianceError
from vmprovision.appliance.watchdog import Watchdog
from vmprovision.errors import ApplianceError, CommandError
from vmprovision.host import workspace
from vmprovision.host.workspace import Workspace, make_workspace
from vmprovision.image.diskfile import name_of
from vmprovision.image.header import FORMATS
from vmprovision.qemu.monitor import Connection, Listener, Monitor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from vmprovision.appliance.drives import Drive
    from vmprovision.appliance.snapshot.store import SavedAppliance
    from vmprovision.progress import Control

log = logging.getLogger(__name__)

RESTORE_SECONDS = 20.0  # 0.4 s on an idle host without KVM
KVM_RESTORE_SECONDS = 10.0  # a KVM that passes its trial may still hang
WORK_SECONDS = 240.0  # a journal to replay or to flush, on a slow disk of a loaded host
ENTROPY_BYTES = 16 + 64  # a machine-id, and what the random generator gets
SESSION = "session"
PREFIX = f"{workspace.PREFIX}{SESSION}-"
SOCKET_PATH_LIMIT = 107  # unix(7)


class RestoredAppliance:
    """One machine that was restored; its disks come and go while it runs.

    Attributes:
        handle: libguestfs's own object, launched.
        monitor: QEMU's.
        watchdog: the time limits of its calls.
    """

    def __init__(self, saved: SavedAppliance, control: Control) -> None:
        """Restore it, without any disk.

        Raises:
            UnusableApplianceError: the paths here cannot be told to QEMU.
            ApplianceError: it did not restore, or not in time.
            CancelledError: the caller cancelled.
        """
        begun = time.monotonic()
        self._workspace = session_folder()
        self._folder = self._workspace.path
        self._connections: list[Connection] = []
        self._serials: dict[int, str] = {}
        self._files: dict[int, Path] = {}
        self._given: dict[int, list[int]] = {}
        self._next = 0
        self._seconds = RESTORE_SECONDS if saved.accelerator == "tcg" else KVM_RESTORE_SECONDS
        self.watchdog = Watchdog(str(self._folder), control)
        self._handle = Handle(str(self._folder))
        self.handle = self._handle.guestfs
        try:
            self.handle.set_tmpdir(str(self._folder))
            self._listeners = {name: Listener(self._folder / name) for name in (MONITOR, ATTENDANT)}
            self._start(saved)
        except BaseException:
            self.close()
            raise
        log.debug("appliance restored in %.2f s", time.monotonic() - begun)

    def attach(self, drive: Drive) -> int:
        """Plug in a disk that is seen to be this drive; its number.

        Raises:
            WrongDiskError: the appliance's new disk is another one.
            ApplianceError: QEMU cannot open it, or it does not appear.
        """
        number, serial = self._next, new_serial()
        self._next += 1
        node = f"disk{number}"
        self._files[number] = drive.path
        with throwaway(drive, self._folder / f"disk{number}.qcow2") as written:
            names = self._give_files(written, number)
            before = self._opened()
            self._tell("blockdev-add", **written.describe(names.__getitem__), node_name=node)
            after = self._opened()
            if written.layer is not None:
                new = [after[name] for name in after.keys() - before.keys()]
                _require_expected(written, names.values(), new)
        size = after[node]["image"]["virtual-size"]
        self._tell(
            "device_add",
            driver="scsi-hd",
            id=f"scsi{number}",
            bus="scsi.0",
            channel=0,
            scsi_id=number,
            lun=0,
            drive=node,
            serial=serial,
            logical_block_size=drive.sectors,
            physical_block_size=drive.sectors,
            **TELL_FAILURES,
        )
        _, name, *found = self.ask("disk", f"attach {number}")
        wanted = (device_name(len(self._serials)), serial, str(size))
        require_disk(drive, wanted, (f"/dev/{name}", *reversed(found)))
        self._serials[number] = serial
        return number

    def finish(self) -> None:
        """Unplug the disks, of which nothing is mounted; what was written is in their files then.

        Raises:
            ApplianceError: one of them does not go.
        """
        for number in list(self._serials):
            self._tell("device_del", id=f"scsi{number}")
            with self._explained():
                self.monitor.wait_for("DEVICE_DELETED")
            self._tell("blockdev-del", node_name=f"disk{number}")
            for given in self._given.pop(number, ()):
                self._tell("remove-fd", fdset_id=given)
            del self._serials[number]
        raise_disk_failure(self.monitor.disk_failures, self._files)

    def raise_disk_failure(self, cause: Exception) -> None:
        """Raise what the host's disk did, where that is why something failed in the guest.

        Raises:
            ImageError: QEMU could not read or write a file of the host.
        """
        self.monitor.catch_up()
        raise_disk_failure(self.monitor.disk_failures, self._files, cause)

    def wait_until_gone(self, number: int) -> None:
        """Wait until the appliance's kernel, too, has let go of a disk that was unplugged.

        Raises:
            ApplianceError: it does not.
        """
        self.ask("gone", f"detach {number}")

    def mount(
        self, device: str, driver: str, place: str, *, readonly: bool, options: str = ""
    ) -> None:
        """Let the kernel mount a disk or partition of the guest; no program is started for it.

        Args:
            device: its node in the appliance.
            driver: the kernel's filesystem.
            place: a directory of the guest, free of links.
            readonly: do not write to it.
            options: of the filesystem's own.

        Raises:
            ApplianceError: the kernel does not.
        """
        words = [device, driver, "ro" if readonly else "rw", place.encode().hex()]
        self.ask("mounted", " ".join(["mount", *words, options.encode().hex()]), WORK_SECONDS)

    def look(self, device: str, driver: str, names: Iterable[str], options: str) -> set[str]:
        """Return which names are in the root directory of a filesystem that is not mounted.

        Raises:
            ApplianceError: the kernel does not mount or read it.
        """
        words = [device, driver, options.encode().hex() or "-", *names]
        return set(self.ask("seen", " ".join(["look", *words]), WORK_SECONDS))

    def unmount(self, place: str | None = None) -> None:
        """Unmount what is at a place of the guest, or all of the guest.

        Raises:
            ApplianceError: something is still in use.
        """
        self.ask("unmounted", f"unmount {(place or '').encode().hex()}", WORK_SECONDS)

    def map_devices(self, table: str, links: Sequence[str]) -> None:
        """Make devices of device-mapper, without udev.

        Args:
            table: in the concise form of dmsetup(8).
            links: for each device of the table its name below ``/dev``.

        Raises:
            ApplianceError: one cannot be made.
        """
        self.ask("mapped", " ".join(["map", table.encode().hex(), *links]), WORK_SECONDS)

    def unmap_devices(self) -> None:
        """Remove the devices of device-mapper, none of which is mounted.

        Raises:
            ApplianceError: one is still in use.
        """
        self.ask("unmapped", "unmap", WORK_SECONDS)

    def activate_volumes(self) -> None:
        """Do with the disks what a stock appliance does as it starts: udev, RAID, LVM.

        Raises:
            ApplianceError: it is not done in time.
        """
        self.ask("volumes", "volumes", WORK_SECONDS)

    def close(self) -> None:
        """End the machine and remove what it left."""
        self.watchdog.stop()
        self.handle.close()
        for connection in self._connections:
            connection.close()
        self._workspace.remove()

    def _start(self, saved: SavedAppliance) -> None:
        failures: list[ApplianceError] = []
        ended = threading.Event()
        guide = threading.Thread(
            target=self._bring_up, args=(saved, ended, failures), name=str(self._folder)
        )
        guide.start()
        try:
            self.handle.set_path(str(saved.folder))
            self.handle.set_hv(str(saved.wrapper))
            # libguestfs wants a disk before it launches; the wrapper leaves it out
            self.handle.add_drive_opts(str(saved.wrapper), format="raw")
            with self.watchdog.limit(self._seconds, "the restoring"):
                self.handle.launch()
            guide.join()
        except RuntimeError as exc:
            self.watchdog.raise_cause()
            raise launch_failure(exc, self._handle.messages) from exc
        finally:
            ended.set()
            guide.join()
            for listener in self._listeners.values():
                listener.close()
        if failures:
            raise failures[0]

    def _bring_up(
        self, saved: SavedAppliance, ended: threading.Event, failures: list[ApplianceError]
    ) -> None:
        """Load the state and let the machine run; in a thread, while libguestfs waits for it."""
        try:
            for name, listener in self._listeners.items():
                connection = listener.accept(RESTORE_SECONDS, lambda: not ended.is_set())
                self._connections.append(connection)
                if name == MONITOR:
                    self.monitor = Monitor(connection, RESTORE_SECONDS)
                else:
                    self._attendant = connection
            monitor = self.monitor
            monitor.ask("migrate-set-capabilities", capabilities=[IGNORE_SHARED])
            monitor.ask(
                "migrate-incoming", uri=f"exec:cat {shlex.quote(str(saved.folder / 'state'))}"
            )
            monitor.wait_for_migration(RESTORE_SECONDS)
            monitor.ask("cont")
            entropy = secrets.token_hex(ENTROPY_BYTES)
            monitor.seconds = WORK_SECONDS
            self.ask("resumed", f"resume {time.time():.0f} {entropy}")
        except ApplianceError as exc:
            failures.append(exc)
            self.watchdog.end(exc)

    def ask(self, answer: str, question: str, seconds: float = RESTORE_SECONDS) -> list[str]:
        """The words with which the attendant answers a question, behind the first, known one.

        Raises:
            ApplianceError: it answers something else, or not in time.
        """
        with self._explained():
            self._attendant.send(question)
            words = self._attendant.receive(seconds).split()
        if words[:1] != [answer]:
            raise ApplianceError(
                f"the appliance cannot {question.split(maxsplit=1)[0]}: {' '.join(words)}"
            )
        return words[1:]

    def _tell(self, command: str, **arguments: Any) -> Any:  # noqa: ANN401 -- any JSON value
        with self._explained():
            return self.monitor.ask(command, **arguments)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise why the watchdog has ended QEMU, where it has, instead of that it is gone."""
        try:
            yield
        except ApplianceError:
            self.watchdog.raise_cause()
            raise

    def _give_files(self, drive: Drive, number: int) -> dict[int, str]:
        """Give QEMU the open files of a drive; the names that it has for them, by our handles."""
        names: dict[int, str] = {}
        for file in drive.layer.files() if drive.layer else ():
            access = os.O_RDONLY if names else os.O_RDWR  # the first is the one that is written
            handle = os.open(name_of(file.handle), access | os.O_CLOEXEC)
            try:
                with self._explained():
                    given = self.monitor.give_file(handle)
            finally:
                os.close(handle)
            self._given.setdefault(number, []).append(given)
            names[file.handle] = f"/dev/fdset/{given}"
        return names

    def _opened(self) -> dict[str, Any]:
        """QEMU's block nodes by their names."""
        nodes = self._tell("query-named-block-nodes", flat=True)
        return {node["node-name"]: node for node in nodes}


def _require_expected(drive: Drive, names: Collection[str], nodes: Sequence[Any]) -> None:
    """Refuse a disk for which QEMU has opened a file that we have not given it.

    Raises:
        WrongDiskError: it has: a header was changed after it was checked.
    """
    chain = drive.layer.chain() if drive.layer else ()
    links = [layer.descriptor.parent for layer in chain if layer.descriptor]
    for node in nodes:
        file = str(node["file"])
        is_linked = any(Path(file).is_relative_to(folder) for folder in links)
        if node["drv"] not in FORMATS and file not in names and not is_linked:
            raise WrongDiskError(
                f"{drive.path} refers to {file}, as it did not when it was checked",
                hint="nothing was written; keep others from the image and try again",
            )


def session_folder() -> Workspace:
    """Return a private folder of one session, whose path QEMU can take.

    Raises:
        UnusableApplianceError: none can be made.
    """
    try:
        return make_workspace(SESSION, _suits)
    except OSError as exc:
        raise UnusableApplianceError(f"no session can have a folder: {exc}") from exc


def _suits(folder: Path) -> bool:
    """Whether a path can stand in an option of QEMU, and hold a socket."""
    is_short = len(os.fsencode(folder / ATTENDANT)) <= SOCKET_PATH_LIMIT
    return is_short and not SPECIAL & {*str(folder)}


def attach_all(restored: RestoredAppliance, drives: Sequence[Drive]) -> list[int] | None:
    """The numbers of the drives; None, and the appliance is gone, where one is not plugged in."""
    try:
        return [restored.attach(drive) for drive in drives]
    except (ApplianceError, CommandError) as exc:
        log.warning("a disk cannot be plugged in, another appliance is started: %s", exc.message)
        restored.close()
        return None
    except BaseException:
        restored.close()
        raise
