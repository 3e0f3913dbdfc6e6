"""The saved appliance, restored: it runs again, and its disks come and go.

libguestfs starts the saved appliance's own script in place of QEMU. QEMU connects to a
monitor's and an attendant's socket in the session's folder. While libguestfs waits for
its daemon, a thread loads the state, lets the machine run, and sets its clock and its
random generator. libguestfs's own protocol stays untouched.
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

from vmprovision.appliance.answers import Described, parse_parts
from vmprovision.appliance.drives import (
    TELL_FAILURES,
    WrongDiskError,
    device_name,
    new_serial,
    raise_disk_failure,
    require_disk,
    throwaway,
)
from vmprovision.appliance.handle import (
    ATTENDANT,
    CALL_SECONDS,
    MONITOR,
    ApplianceCallError,
    Handle,
)
from vmprovision.appliance.snapshot.machine import IGNORE_SHARED, SLOT, SLOT_SERIAL
from vmprovision.disklayout.partitions import SECTOR
from vmprovision.errors import (
    ApplianceError,
    CancelledError,
    CommandError,
    VmprovisionError,
)
from vmprovision.image.diskfile import name_of
from vmprovision.image.header import FORMATS
from vmprovision.qemu.monitor import Connection, Listener, Monitor

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from vmprovision.appliance.answers import Part
    from vmprovision.appliance.drives import Drive
    from vmprovision.appliance.snapshot.store import SavedAppliance
    from vmprovision.filesystem.protocol import Attributes, FileKind
    from vmprovision.progress import Control

log = logging.getLogger(__name__)

# 0.2 s on an idle host without KVM. Giving up costs the boot of a stock appliance, eight times the
# processor time, so a crowded host does better to wait.
RESTORE_SECONDS = 60.0
KVM_RESTORE_SECONDS = 10.0  # a KVM that passes its trial may still hang
WORK_SECONDS = 240.0  # to replay or flush a journal, on the slow disk of a loaded host
READING_LIMIT = 128 << 10  # of the attendant's memory
READINGS_KEPT = 8
ANSWER_LIMIT = 512 << 10  # twice what the attendant sends
KINDS: dict[FileKind, str] = {"file": "f", "directory": "d", "symlink": "l", "other": "f"}
ENTROPY_BYTES = 16 + 64  # a machine-id, and a seed for the random generator
# Whoever needs a disk to be safe against a crash of the host syncs its file at the end.
UNSYNCED = {"direct": False, "no-flush": True}


class _AttendantError(ApplianceError):
    """The attendant answered that it failed, or what was not asked.

    Attributes:
        number: errno as the appliance saw it, 0 if there is none.
    """

    def __init__(self, command: str, words: Sequence[str]) -> None:
        """Take the command and the words of the answer."""
        super().__init__(f"the appliance cannot {command}: {' '.join(words)}")
        failed = words[:1] == ["failed"] and words[1:2] and words[1].isdecimal()
        self.number = int(words[1]) if failed else 0


class RestoredAppliance:
    """One machine that was restored; its disks come and go while it runs.

    It meets the Protocol ``Appliance``, and can be used for one set of disks after
    another.

    Attributes:
        saved: of which it is a copy.
        monitor: QEMU's.
        attached: how many disks were attached to it, one after another.
        has_volumes: whether udev, RAID and LVM run in it.
    """

    def __init__(self, saved: SavedAppliance, control: Control) -> None:
        """Restore it, without any disk.

        Raises:
            SessionFolderError: no folder for the session can be made.
            ApplianceError: it did not restore, or not in time.
            CancelledError: the caller cancelled.
        """
        begun = time.monotonic()
        self.saved = saved
        self._connections: list[Connection] = []
        self._closings: list[Callable[[], None]] = []
        self._serials: dict[int, str] = {}
        self._files: dict[int, Path] = {}
        self._given: dict[int, list[int]] = {}
        self._readings: dict[tuple[str, ...], bytes] = {}  # until anything else is done
        self.attached = 0
        self._has_slot = True
        self._seconds = RESTORE_SECONDS if saved.accelerator == "tcg" else KVM_RESTORE_SECONDS
        self.has_volumes = False
        self._has_mapped = False
        self._handle = Handle(control)
        self._watchdog = self._handle.watchdog
        self._folder = self._handle.folder
        try:
            self._listeners = {name: Listener(self._folder / name) for name in (MONITOR, ATTENDANT)}
            self._start()
        except BaseException:
            self.close()
            raise
        log.debug("appliance restored in %.2f s", time.monotonic() - begun)

    def serve(self, control: Control) -> None:
        """Take progress and cancellation from another caller from now on."""
        self._watchdog.serve(control)

    def call(self, name: str, *arguments: Any, limit: float = CALL_SECONDS, **options: Any) -> Any:  # noqa: ANN401 -- untyped library
        """Implement ``Appliance.call``."""
        self._readings.clear()
        return self._handle.call(name, *arguments, limit=limit, **options)

    def attach(self, drive: Drive) -> None:
        """Attach a disk and check that it is this drive.

        Raises:
            WrongDiskError: the appliance's new disk is a different one.
            ApplianceError: QEMU cannot open it, or it does not appear.
        """
        self._readings.clear()
        in_slot = self._has_slot and not self._serials
        if in_slot and drive.sectors != SECTOR:
            self._remove_slot()
            in_slot = False
        self.attached += 1
        number = 0 if in_slot else self.attached
        node = f"disk{number}"
        self._files[number] = drive.path
        with throwaway(drive, self._folder / f"disk{self.attached}.qcow2") as written:
            names = self._give_files(written, number)
            before = self._opened()
            described = written.describe(names.__getitem__)
            self._tell("blockdev-add", **described, node_name=node, cache=UNSYNCED)
            after = self._opened()
            if written.layer is not None:
                new = [after[name] for name in after.keys() - before.keys()]
                _require_expected(written, names.values(), new)
        size = after[node]["image"]["virtual-size"]
        serial = self._insert(node) if in_slot else self._plug_in(node, number, drive.sectors)
        _, name, *found = self.ask("disk", f"attach {number}")
        wanted = (device_name(len(self._serials)), serial, str(size))
        require_disk(drive, wanted, (f"/dev/{name}", *reversed(found)))
        self._serials[number] = serial

    def _insert(self, node: str) -> str:
        """Put a disk into the drive that is there from the start; return its serial number."""
        self._tell("blockdev-open-tray", id=SLOT, force=True)
        self._tell("blockdev-insert-medium", id=SLOT, node_name=node)
        self._tell("blockdev-close-tray", id=SLOT)
        return SLOT_SERIAL

    def _plug_in(self, node: str, number: int, sectors: int) -> str:
        """Plug in a disk of its own; return its serial number."""
        serial = new_serial()
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
            logical_block_size=sectors,
            physical_block_size=sectors,
            **TELL_FAILURES,
        )
        return serial

    def _remove_slot(self) -> None:
        """Remove the drive, whose sectors have 512 bytes, so that another disk is the first."""
        self._has_slot = False
        self._unplug(SLOT, 0)

    def mount(
        self, device: str, driver: str, place: str, *, readonly: bool, options: str = ""
    ) -> None:
        """Mount as the Protocol has it; the attendant does so without starting a program."""
        words = [device, driver, "ro" if readonly else "rw", place.encode().hex()]
        self._ask_to("mounted", "mount", *words, options.encode().hex())

    def look(
        self, device: str, driver: str, names: Iterable[str], options: str = ""
    ) -> set[str] | None:
        """Implement ``Appliance.look``."""
        words = [device, driver, options.encode().hex() or "-"]
        return set(self._ask_to("seen", "look", *words, *names))

    def read_device(self, device: str, place: int, size: int) -> bytes:
        """Implement ``Appliance.read_device``.

        Before each call with a device, guestfsd starts a program that waits for udev, which
        takes longer than the reading. The attendant starts none.
        """
        if size > READING_LIMIT:
            return bytes(self.call("pread_device", device, size, place))
        asked = ("read", device, str(place), str(size))
        if asked not in self._readings:  # what shows the size of the sectors is read again
            if len(self._readings) == READINGS_KEPT:
                self._readings.clear()
            self._readings[asked] = self._ask_for_bytes(size, *asked)
        return self._readings[asked]

    def read_file(self, path: str, place: int, size: int) -> bytes:
        """Implement ``Appliance.read_file``."""
        if size > READING_LIMIT:
            return bytes(self.call("pread", path, size, place))
        return self._ask_for_bytes(size, "content", path.encode().hex(), str(place), str(size))

    def entries(
        self, places: Sequence[str], *, known: int, wanted: Sequence[str], limit: int
    ) -> list[Part]:
        """Implement ``Appliance.entries``."""
        return self._ask_for_parts(places, "entries", str(known), ",".join(wanted), str(limit))

    def statuses(self, folder: str, names: Sequence[str]) -> list[Described | int]:
        """Implement ``Appliance.statuses``."""
        places = [os.path.normpath(f"{folder}/{name}") for name in names]
        found = self._ask_for_parts(places, "statuses")
        return [part if isinstance(part, Described) else _errno_of(part) for part in found]

    def read_link(self, folder: str, name: str) -> bytes:
        """Implement ``Appliance.read_link``."""
        return self._status_of(f"{folder}/{name}").target

    def read_label(self, place: str) -> bytes | None:
        """Implement ``Appliance.read_label``."""
        return self._status_of(place).label or None

    def is_sealed(self, place: str) -> bool:
        """Implement ``Appliance.is_sealed``; guestfsd would start btrfs(8)."""
        return self._answer_to("sealed", "sealed", place.encode().hex()) == ["yes"]

    def _status_of(self, place: str) -> Described:
        (found,) = self.statuses(place, ["."])
        if isinstance(found, int):
            raise ApplianceCallError(os.strerror(found), number=found)
        return found

    def _ask_for_parts(self, places: Sequence[str], *question: str) -> list[Part]:
        words = [place.encode().hex() for place in places]
        found = parse_parts(self._ask_for_bytes(ANSWER_LIMIT, *question, *words))
        if len(found) != len(places):
            raise ApplianceError("the appliance has answered something else than it was asked")
        return found

    def _ask_for_bytes(self, limit: int, *question: str, content: bytes = b"") -> bytes:
        """Ask the attendant for at most so many bytes.

        Raises:
            ApplianceCallError: the attendant cannot read them.
            ApplianceError: it has sent something else.
        """
        (count,) = self._answer_to(question[0], *question, content=content)
        if not count.isdecimal() or int(count) > limit:
            raise ApplianceError(f"the appliance sends {count} bytes, more than {limit}")
        with self._explained():
            return self._attendant.receive_bytes(int(count), WORK_SECONDS)

    def make(self, place: str, kind: FileKind, content: bytes, attributes: Attributes) -> Described:
        """Implement ``Appliance.make``."""
        self._readings.clear()
        owner = (str(attributes.uid), str(attributes.gid))
        label = (attributes.label or "").encode().hex() or "-"
        words = [KINDS[kind], place.encode().hex(), str(attributes.mode or 0), *owner, label]
        question = ("make", *words, str(len(content)))
        (made,) = parse_parts(self._ask_for_bytes(ANSWER_LIMIT, *question, content=content))
        if not isinstance(made, Described):
            number = _errno_of(made)
            raise ApplianceCallError(os.strerror(number), number=number)
        return made

    def remove(self, place: str, kind: FileKind) -> None:
        """Implement ``Appliance.remove``."""
        self._ask_to("removed", "remove", KINDS[kind], place.encode().hex())

    def unmount(self, place: str | None = None) -> None:
        """Implement ``Appliance.unmount``."""
        if place is not None:
            self.ask("unmounted", f"unmount {place.encode().hex()}", WORK_SECONDS)
        elif self.has_volumes:  # perhaps more mounts than the attendant reads at once
            self.call("umount_all")
        else:
            self.ask("unmounted", "unmount", WORK_SECONDS)

    def map_devices(self, table: str, links: Sequence[str]) -> None:
        """Implement ``Appliance.map_devices``."""
        if not self.has_volumes and not self._has_mapped:
            self._ask_to("mapped", "map", table.encode().hex(), *links)
            self._has_mapped = True

    def _ask_to(self, answer: str, *question: str) -> list[str]:
        """Ask the attendant for what may change the guest, and may fail because of it.

        Raises:
            ApplianceCallError: the attendant cannot do it.
        """
        self._readings.clear()
        return self._answer_to(answer, *question)

    def _answer_to(self, answer: str, *question: str, content: bytes = b"") -> list[str]:
        """Ask the attendant for what may fail because of the guest.

        Raises:
            ApplianceCallError: the attendant cannot do it.
        """
        try:
            return self.ask(answer, " ".join(question), WORK_SECONDS, content)
        except _AttendantError as exc:
            raise ApplianceCallError(exc.message, number=exc.number) from exc

    def activate_volumes(self) -> None:
        """Implement ``Appliance.activate_volumes`` by the steps of a stock appliance's start."""
        self._readings.clear()
        if not self.has_volumes:
            self.ask("volumes", "volumes", WORK_SECONDS)
            self.has_volumes = True

    def before_detaching(self, close: Callable[[], None]) -> None:
        """Implement ``Appliance.before_detaching``."""
        self._closings.append(close)

    def finish(self) -> None:
        """Implement ``Appliance.finish``; the machine is stopped.

        QEMU brings what it holds of the disks to their files before it answers.
        """
        self._unmount_all()
        self._tell("stop")
        raise_disk_failure(self.monitor.disk_failures, self._files)

    def detach(self) -> None:
        """Do as ``finish`` does, but the machine runs on and can get other disks.

        Raises:
            ApplianceError: as ``finish``; or the appliance's kernel has not let go of a disk
                in time.
        """
        self._unmount_all()
        if self._has_mapped:  # device-mapper keeps no data that the machine's end would lose
            self.ask("unmapped", "unmap", WORK_SECONDS)
            self._has_mapped = False
        for number in list(self._serials):
            self._detach(number)
        raise_disk_failure(self.monitor.disk_failures, self._files)

    def _unmount_all(self) -> None:
        self.call("set_autosync", False)  # noqa: FBT003 -- libguestfs's; nothing is left to sync
        self.unmount()
        while self._closings:
            self._closings.pop(0)()

    def _detach(self, number: int) -> None:
        if self._has_slot and number == 0:
            self._tell("blockdev-open-tray", id=SLOT, force=True)
            self._tell("blockdev-remove-medium", id=SLOT)
            self.ask("empty", f"empty {number}")
        else:
            self._unplug(f"scsi{number}", number)
        self._tell("blockdev-del", node_name=f"disk{number}")
        for given in self._given.pop(number, ()):
            self._tell("remove-fd", fdset_id=given)
        del self._serials[number]

    def _unplug(self, device: str, number: int) -> None:
        self._tell("device_del", id=device)
        with self._explained():
            self.monitor.wait_for("DEVICE_DELETED")
        self.ask("gone", f"detach {number}")

    def raise_host_fault(self, exc: Exception) -> None:
        """Implement ``Appliance.raise_host_fault``."""
        self._watchdog.raise_cause()
        self.monitor.catch_up()
        raise_disk_failure(self.monitor.disk_failures, self._files, exc)

    def close(self) -> None:
        """Implement ``Appliance.close``."""
        self._handle.close()
        for connection in self._connections:
            connection.close()

    def _start(self) -> None:
        saved = self.saved
        failures: list[VmprovisionError] = []
        ended = threading.Event()
        guide = threading.Thread(
            target=self._bring_up, args=(ended, failures), name=str(self._folder)
        )
        guide.start()
        try:
            guestfs = self._handle.guestfs
            guestfs.set_path(str(saved.folder))
            guestfs.set_hv(str(saved.wrapper))
            # libguestfs requires a disk before it launches; the script leaves it out
            guestfs.add_drive_opts(str(saved.wrapper), format="raw")
            self._handle.launch(self._seconds, "restoring")
            guide.join()
        finally:
            ended.set()
            guide.join()
            for listener in self._listeners.values():
                listener.close()
        if failures:
            raise failures[0]

    def _bring_up(self, ended: threading.Event, failures: list[VmprovisionError]) -> None:
        """Load the state and let the machine run, in a thread while libguestfs waits for it."""
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
            state = shlex.quote(str(self.saved.folder / "state"))
            monitor.ask("migrate-incoming", uri=f"exec:cat {state}")
            monitor.wait_for_migration(RESTORE_SECONDS)
            monitor.ask("cont")
            entropy = secrets.token_hex(ENTROPY_BYTES)
            monitor.seconds = WORK_SECONDS
            self.ask("resumed", f"resume {time.time():.0f} {entropy}")
        except (ApplianceError, CancelledError) as exc:  # nobody else reads this thread's errors
            failures.append(exc)
            self._watchdog.end(exc)

    def ask(
        self, answer: str, question: str, seconds: float = RESTORE_SECONDS, content: bytes = b""
    ) -> list[str]:
        """Ask the attendant; return the words of its answer behind the first, expected one.

        Args:
            answer: the first word of its answer.
            question: a line.
            seconds: how long to wait.
            content: bytes that belong to the question.

        Raises:
            ApplianceError: it answers something else, or not in time.
        """
        with self._explained():
            self._attendant.send(question, content)
            words = self._attendant.receive(seconds).split()
        if words[:1] != [answer]:
            raise _AttendantError(question.split(maxsplit=1)[0], words)
        return words[1:]

    def _tell(self, command: str, **arguments: Any) -> Any:  # noqa: ANN401 -- any JSON value
        with self._explained():
            return self.monitor.ask(command, **arguments)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise the watchdog's reason, if it has ended QEMU, not the loss of the connection."""
        try:
            yield
        except ApplianceError:
            self._watchdog.raise_cause()
            raise

    def _give_files(self, drive: Drive, number: int) -> dict[int, str]:
        """Give QEMU the open files of a drive; return its names for them, by our descriptors."""
        names: dict[int, str] = {}
        for file in drive.layer.files() if drive.layer else ():
            access = os.O_RDONLY if names else os.O_RDWR  # only the first is written to
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
        """Return QEMU's block nodes by their names."""
        nodes = self._tell("query-named-block-nodes", flat=True)
        return {node["node-name"]: node for node in nodes}


def _errno_of(part: Part) -> int:
    """Return the errno that came in place of a status.

    Raises:
        ApplianceError: something else came.
    """
    if not isinstance(part, int):
        raise ApplianceError("the appliance has answered something else than a status")
    return part


def _require_expected(drive: Drive, names: Collection[str], nodes: Sequence[Any]) -> None:
    """Refuse a disk for which QEMU opened a file that it was not given.

    Raises:
        WrongDiskError: a header was changed after it was checked.
    """
    chain = drive.layer.chain() if drive.layer else ()
    links = [layer.descriptor.parent for layer in chain if layer.descriptor]
    for node in nodes:
        file = str(node["file"])
        is_linked = any(Path(file).is_relative_to(folder) for folder in links)
        if node["drv"] not in FORMATS and file not in names and not is_linked:
            raise WrongDiskError(
                f"{drive.path} was changed after it was checked: it now refers to {file}",
                hint="nothing was written; keep other users from the image and try again",
            )


def attach_all(restored: RestoredAppliance, drives: Sequence[Drive]) -> RestoredAppliance | None:
    """Attach drives; return the appliance, or close it and return None."""
    try:
        for drive in drives:
            restored.attach(drive)
    except (ApplianceError, CommandError) as exc:
        log.warning("a disk cannot be attached, starting another appliance: %s", exc.message)
        restored.close()
        return None
    except BaseException:
        restored.close()
        raise
    return restored
