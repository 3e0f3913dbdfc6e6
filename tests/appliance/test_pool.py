"""Appliances that wait ready or are used again: whom they serve, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.image.tiny import tiny_disk
from vmprovision.appliance import shared
from vmprovision.appliance.ahead import ApplianceAhead
from vmprovision.appliance.drives import Drive, WrongDiskError
from vmprovision.appliance.filesystem import ApplianceFilesystem
from vmprovision.appliance.handle import SESSION, ApplianceCallError
from vmprovision.appliance.rehearsal import rehearse
from vmprovision.appliance.snapshot.host import host_appliance
from vmprovision.appliance.snapshot.restore import RestoredAppliance
from vmprovision.appliance.snapshot.scratch import SCRATCH
from vmprovision.errors import ApplianceError, CancelledError, PlanError
from vmprovision.filesystem.protocol import ROOT
from vmprovision.host import workspace
from vmprovision.host.command import find_program, run
from vmprovision.progress import Control
from vmprovision.qemu.monitor import Monitor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.appliance

READY_SECONDS = 240.0  # a loaded host that has no saved appliance yet
ORPHAN_SECONDS = 20.0
NO_OPTIONS = vmprovision.InjectOptions()
PREFIX = f"{workspace.PREFIX}{SESSION}-"


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small guest, which tests only read."""
    return tiny_disk(tmp_path_factory.mktemp("guest") / "guest.raw", {})


@pytest.fixture
def images(guest: Path, tmp_path: Path) -> Callable[[int], list[Path]]:
    """Return a function that copies the guest."""

    def make(count: int) -> list[Path]:
        found = [tmp_path / f"guest-{number}.raw" for number in range(count)]
        for path in found:
            shutil.copyfile(guest, path)
        return found

    return make


@pytest.fixture(scope="module")
def pool() -> Iterator[vmprovision.Pool]:
    """Two appliances that wait ready."""
    with vmprovision.Pool(size=2) as made:
        assert made.wait_until_ready(READY_SECONDS)
        yield made


RAW = vmprovision.ImageOptions(format="raw")


def test_threads_share_a_pool(pool: vmprovision.Pool, images: Callable[[int], list[Path]]) -> None:
    """With more callers than appliances each is served, and its image injected."""
    made = images(5)

    def work(image: Path) -> int:
        return len(vmprovision.inject(image, source=RAW, pool=pool).changed)

    with ThreadPoolExecutor(5) as threads:
        changes = list(threads.map(work, made))
    assert len(set(changes)) == 1
    assert changes[0] > 5
    for image in made:
        assert not vmprovision.verify(image, source=RAW, pool=pool).mismatches


def test_coroutines_share_a_pool(
    pool: vmprovision.Pool, images: Callable[[int], list[Path]]
) -> None:
    """The event loop runs while appliances work."""
    made = images(3)
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0.02)

    async def main() -> list[vmprovision.ChangeReport]:
        heart = asyncio.create_task(beat())
        reports = await asyncio.gather(
            *(asyncio.to_thread(vmprovision.inject, i, source=RAW, pool=pool) for i in made)
        )
        heart.cancel()
        return list(reports)

    assert [report.image for report in asyncio.run(main())] == made
    assert beats > 10


def test_no_image_meets_a_used_appliance(
    pool: vmprovision.Pool, images: Callable[[int], list[Path]]
) -> None:
    """A marker left in one appliance is not seen in the next."""
    for image in images(3):
        drive = Drive(path=image, format="raw", readonly=True)
        with pool.open([drive], control=Control()) as appliance:
            seen = appliance.call("debug", "sh", ["cat /tmp/mark 2>&1; echo used > /tmp/mark"])
            assert "used" not in seen


def test_libguestfs_prints_nothing(
    pool: vmprovision.Pool,
    images: Callable[[int], list[Path]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A name in an error may have a terminal's escape sequences in it."""
    drive = Drive(path=images(1)[0], format="raw", readonly=True)
    with pool.open([drive], control=Control()) as appliance:
        appliance.call("mount_ro", "/dev/sda", "/")
        capfd.readouterr()
        with pytest.raises(ApplianceCallError):
            appliance.call("readdir", "/\x1b[31mmissing")
    assert capfd.readouterr().err == ""


def test_waiting_for_a_turn_can_be_cancelled(images: Callable[[int], list[Path]]) -> None:
    """The only turn is taken: the second caller waits, and stops when it is cancelled."""
    first, second = images(2)
    control = Control()
    drive = Drive(path=first, format="raw")
    with vmprovision.Pool(size=1) as pool, pool.open([drive], control=Control()):
        threading.Timer(0.5, control.cancelled.set).start()
        with pytest.raises(CancelledError):
            vmprovision.inject(second, source=RAW, pool=pool, control=control)
    assert second.read_bytes() == first.read_bytes()


def test_running_work_can_be_cancelled(
    pool: vmprovision.Pool, images: Callable[[int], list[Path]]
) -> None:
    """The image is unchanged, and the pool serves the next caller."""
    first, second = images(2)
    before = first.read_bytes()
    control = Control()
    control.report = lambda p: control.cancelled.set() if p.step == "verifying" else None
    with pytest.raises(CancelledError):
        vmprovision.inject(first, source=RAW, pool=pool, control=control)
    assert first.read_bytes() == before
    assert vmprovision.inject(second, source=RAW, pool=pool).changed


def test_a_closed_pool_serves_nobody(
    pool: vmprovision.Pool, images: Callable[[int], list[Path]]
) -> None:
    """The error says that it is closed, and nothing of it is left."""
    assert pool.wait_until_ready(READY_SECONDS)  # so it restores no more meanwhile
    before = machines()
    another = vmprovision.Pool(size=1)
    assert another.wait_until_ready(READY_SECONDS)
    assert machines() - before
    another.close()
    assert not machines() - before
    with pytest.raises(ApplianceError, match="closed"):
        vmprovision.inspect(images(1)[0], source=RAW, pool=another)
    with pytest.raises(PlanError):
        vmprovision.Pool(size=0)


def test_an_appliance_that_died_while_it_waited_is_replaced(
    pool: vmprovision.Pool, images: Callable[[int], list[Path]]
) -> None:
    """The host may run out of memory; the caller notices nothing."""
    assert pool.wait_until_ready(READY_SECONDS)  # so it restores no more meanwhile
    before = machines()
    with vmprovision.Pool(size=1) as another:
        assert another.wait_until_ready(READY_SECONDS)
        (machine,) = machines() - before
        os.kill(machine, signal.SIGKILL)
        assert vmprovision.inject(images(1)[0], source=RAW, pool=another).changed


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_a_rehearsal_leaves_an_appliance_for_any_disk(
    steps: int, images: Callable[[int], list[Path]]
) -> None:
    """Whether it goes to its end or a call comes in between."""
    left = itertools.count(steps, -1)
    with restored() as machine:
        scratch = machine.saved.folder / SCRATCH
        before = scratch.read_bytes()
        assert rehearse(machine, lambda: next(left) > 0) == (steps == 4)
        assert scratch.read_bytes() == before
        drive = Drive(path=images(1)[0], format="raw")
        machine.attach(drive)
        machine.mount("/dev/sda", "ext4", "/", readonly=False)
        files = ApplianceFilesystem(machine)
        assert "folder" not in files.list_directory(ROOT)
        files.write(ROOT / "new", b"content")
        machine.finish()
    written = run([find_program("debugfs"), "-R", "cat /new", drive.path], timeout=60)
    assert written.stdout == "content"


def test_appliances_rehearse_if_no_call_comes(
    images: Callable[[int], list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    """With the next call they work as before, and those restored later rehearse, too."""
    caplog.set_level(logging.DEBUG, "vmprovision")
    accelerator = host_appliance(Control())
    with vmprovision.Pool(size=2) as pool:
        for image in images(2):
            assert pool.wait_until_ready(READY_SECONDS)
            assert vmprovision.inject(image, source=RAW, pool=pool).changed
        assert pool.wait_until_ready(READY_SECONDS)
    done = [record for record in caplog.records if "has rehearsed" in record.message]
    expected = 4 if accelerator and accelerator.accelerator == "tcg" else 0
    assert len(done) == expected


WAITS = """
import sys, time, vmprovision
pool = vmprovision.Pool(size=2)
print(pool.wait_until_ready(240), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("group", [False, True], ids=["the process", "its whole group"])
def test_a_killed_process_leaves_no_machine(*, group: bool) -> None:
    """QEMU ends with it, and the next session removes its folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    assert process.stdout.readline() == "True\n"
    started = machines(process.pid)
    assert len(started) == 2
    folders = [session_of(machine) for machine in started]
    assert all(folder.is_dir() for folder in folders)
    if group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    deadline = time.monotonic() + ORPHAN_SECONDS
    while any(is_machine(Path(f"/proc/{machine}")) for machine in started):
        assert time.monotonic() < deadline, "a machine lives on"
        time.sleep(0.1)
    with restored():
        assert not [folder for folder in folders if folder.exists()]


def test_cancelling_a_restore_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine ends while it is resumed; no thread dies with an error of its own."""
    saved = host_appliance(Control())
    assert saved is not None
    before = machines()
    control = Control()
    ask = Monitor.ask

    def cancel(self: Monitor, command: str, **arguments: object) -> object:
        answer = ask(self, command, **arguments)
        if command == "cont":
            control.cancelled.set()
            deadline = time.monotonic() + ORPHAN_SECONDS
            while machines() - before:
                assert time.monotonic() < deadline, "the machine lives on"
                time.sleep(0.01)
        return answer

    dead: list[object] = []
    monkeypatch.setattr(Monitor, "ask", cancel)
    monkeypatch.setattr(threading, "excepthook", dead.append)
    with pytest.raises(CancelledError):
        RestoredAppliance(saved, control)
    assert not dead


def test_a_shared_appliance_is_renewed(
    images: Callable[[int], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a number of disks it ends, with what its kernel has kept of them."""
    monkeypatch.setattr(shared, "DISKS_LIMIT", 2)
    (image,) = images(1)
    drive = Drive(path=image, format="raw", readonly=True)
    before = machines()
    seen = []
    appliances = shared.SharedAppliances()
    for _ in range(3):
        with appliances.open([drive], control=Control()):
            seen.append(machines() - before)
    appliances.close()
    assert seen[0] == seen[1]
    assert not seen[1] & seen[2]
    assert machines() == before


def test_an_appliance_ahead_serves_one_image(images: Callable[[int], list[Path]]) -> None:
    """The second image gets another, and none is left."""
    drives = [Drive(path=image, format="raw", readonly=True) for image in images(2)]
    before = machines()
    seen = []
    with contextlib.closing(ApplianceAhead(Control())) as ahead:
        (waiting,) = machines() - before
        for drive in drives:
            with ahead.open([drive], control=Control()) as appliance:
                assert not appliance.has_volumes, "this is a stock appliance"
                seen.append(machines() - before)
        assert machines() == before
    assert seen[0] == {waiting}
    assert waiting not in seen[1]
    with contextlib.closing(ApplianceAhead(Control())):
        assert machines() != before
    assert machines() == before


def test_another_disk_in_its_place_is_refused(images: Callable[[int], list[Path]]) -> None:
    """An earlier disk of the same size has the name that libguestfs will use."""
    first, wanted, other = images(3)
    with restored() as machine:
        machine.attach(Drive(path=first, format="raw"))
        slip_in(machine, other)
        with pytest.raises(WrongDiskError, match="is not"):
            machine.attach(Drive(path=wanted, format="raw"))


def test_a_disk_of_another_size_is_refused(
    images: Callable[[int], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that grows after QEMU has opened it is not the disk that was checked."""
    (image,) = images(1)
    with restored() as machine:
        ask = machine.monitor.ask

        def meddle(command: str, **arguments: object) -> object:
            if command == "blockdev-insert-medium":
                ask("block_resize", node_name="disk0", size=image.stat().st_size + (1 << 20))
            return ask(command, **arguments)

        monkeypatch.setattr(machine.monitor, "ask", meddle)
        with pytest.raises(WrongDiskError, match="size"):
            machine.attach(Drive(path=image, format="raw"))


def test_bytes_are_read_as_libguestfs_reads_them(tmp_path: Path) -> None:
    """The attendant and guestfsd read the same: lines, the end, beyond it, and no such device."""
    image = tmp_path / "disk.raw"
    content = random.Random(1).randbytes(1 << 20)
    image.write_bytes(content[:-2] + b"\n\n")
    end = 1 << 20
    with restored() as machine:
        machine.attach(Drive(path=image, format="raw"))
        for place, size in ((0, 1), (511, 73728), (end - 5, 5), (end - 5, 900), (end, 9)):
            read = machine.read_device("/dev/sda", place, size)
            assert read == image.read_bytes()[place : place + size]
            assert read == machine.call("pread_device", "/dev/sda", size, place)
        assert machine.read_device("/dev/sda", 3, 1 << 19) == content[3 : 3 + (1 << 19)]
        with pytest.raises(ApplianceCallError):
            machine.read_device("/dev/sdb", 0, 1)
        assert machine.read_device("/dev/sda", 7, 2) == content[7:9]
        machine.finish()


def test_disks_of_all_kinds_follow_each_other(tmp_path: Path) -> None:
    """Each is read anew, with its own size, partitions and sectors, whatever was there before."""
    partitioned = tmp_path / "partitioned.raw"
    partitioned.write_bytes(bytes(8 << 20))
    table = "label: dos\n2048,2048\n4096,4096\n"
    subprocess.run(["sfdisk", "-q", partitioned], input=table, text=True, check=True, timeout=60)
    plain, small = tmp_path / "plain.raw", tmp_path / "small.raw"
    plain.write_bytes(random.Random(2).randbytes(8 << 20))
    small.write_bytes(random.Random(3).randbytes(4 << 20))

    def sizes(machine: RestoredAppliance) -> dict[str, int]:
        names = [*machine.call("list_devices"), *machine.call("list_partitions")]
        return {name: machine.call("blockdev_getsize64", name) for name in names}

    def require_start(machine: RestoredAppliance, device: str, image: Path) -> None:
        assert machine.read_device(device, 0, 4096) == image.read_bytes()[:4096]

    disks = {path: Drive(path=path, format="raw") for path in (partitioned, plain, small)}
    with restored() as machine:
        for _ in range(2):
            machine.attach(disks[partitioned])
            parts = {"/dev/sda1": 1 << 20, "/dev/sda2": 2 << 20}
            assert sizes(machine) == {"/dev/sda": 8 << 20, **parts}
            machine.detach()
            machine.attach(disks[plain])
            assert sizes(machine) == {"/dev/sda": 8 << 20}
            require_start(machine, "/dev/sda", plain)
            machine.attach(disks[small])
            assert sizes(machine) == {"/dev/sda": 8 << 20, "/dev/sdb": 4 << 20}
            require_start(machine, "/dev/sdb", small)
            machine.detach()
        for sectors in (4096, 512):
            machine.attach(Drive(path=small, format="raw", sectors=sectors))
            assert machine.call("blockdev_getss", "/dev/sda") == sectors
            require_start(machine, "/dev/sda", small)
            machine.detach()
        machine.attach(disks[plain])
        require_start(machine, "/dev/sda", plain)
        machine.finish()


@contextlib.contextmanager
def restored() -> Iterator[RestoredAppliance]:
    """A restored appliance without a disk."""
    saved = host_appliance(Control())
    assert saved is not None
    machine = RestoredAppliance(saved, Control())
    try:
        yield machine
    finally:
        machine.close()


def slip_in(machine: RestoredAppliance, image: Path) -> None:
    """Attach a disk without the session's knowledge."""
    monitor = machine.monitor
    file = {"driver": "file", "filename": str(image)}
    monitor.ask("blockdev-add", driver="raw", node_name="other", file=file)
    device = {"driver": "scsi-hd", "bus": "scsi.0", "scsi_id": 99, "serial": "other"}
    monitor.ask("device_add", **device, drive="other", id="other")
    machine.ask("disk", "attach 99")


def machines(parent: int | None = None) -> set[int]:
    """Return the QEMUs of restored appliances of a process, by default this one."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and is_machine(entry):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == (parent or os.getpid()):
                    found.add(int(entry.name))
    return found


def session_of(machine: int) -> Path:
    """Return the session folder of a QEMU, which is its name."""
    words = Path(f"/proc/{machine}/cmdline").read_text().split("\0")
    return Path(words[words.index("-name") + 1])


def is_machine(entry: Path) -> bool:
    """Return whether a process, given its folder in /proc, is a restored appliance."""
    with contextlib.suppress(OSError):
        words = (entry / "cmdline").read_bytes().split(b"\0")
        return any(PREFIX.encode() in word for word in words) and b"-incoming" in words
    return False


def test_cancelling_while_the_disks_are_detached_is_reported_as_such(
    pool: vmprovision.Pool, images: Callable[[int], list[Path]]
) -> None:
    """The error is the cancellation, not the lost machine."""
    control = Control()

    def work() -> None:
        drive = Drive(path=images(1)[0], format="raw")
        with pool.open([drive], control=control) as appliance:
            control.cancelled.set()
            with contextlib.suppress(CancelledError):
                while True:
                    appliance.call("list_devices")

    with pytest.raises(CancelledError):
        work()
