"""Kill it anywhere: the image is untouched, or ``recover`` or the next run finishes it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.conftest import require_root
from tests.image.conftest import check_refusal, file_hash, state_of
from tests.image.tiny import tiny_disk
from vmprovision.errors import CancelledError, ImageLockedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import RunCli
    from tests.image.conftest import Refuse

pytestmark = pytest.mark.appliance

LOCKED, RECOVERY, INTERRUPTED = 13, 18, 130
QEMU_LOCK_BYTES = (100, 200)  # from which byte on, and how many: see vmprovision/image/lock.py
PATIENCE = 240.0  # a loaded host without KVM
OPEN, SEALED, MERGING = ".vmprovision-open", ".vmprovision-sealed", ".vmprovision-merging"


@pytest.fixture(scope="session")
def tiny_qcow2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small guest, for reading only."""
    folder = tmp_path_factory.mktemp("tiny")
    raw, made = tiny_disk(folder / "tiny.raw", {}), folder / "tiny.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, made], check=True)
    return made


@pytest.fixture
def image(tiny_qcow2: Path, tmp_path: Path) -> Path:
    """Return a copy of the small guest, alone in a folder."""
    (tmp_path / "images").mkdir()
    return Path(shutil.copy(tiny_qcow2, tmp_path / "images" / "guest.qcow2"))


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts ``vmprovision`` in a process group, as a shell does."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str | Path, path: Path | None = None) -> subprocess.Popen[str]:
        search = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
        process = subprocess.Popen(
            [sys.executable, "-m", "vmprovision", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PATH": search},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def beside(image: Path, suffix: str) -> Path:
    """Return the file beside an image whose name goes on with this suffix."""
    return image.with_name(image.name + suffix)


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for a condition; fail the test where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def machines_on(image: Path) -> list[int]:
    """Return other processes with the image, or a file beside it, open or in their command."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if str(image).encode() in (entry / "cmdline").read_bytes() or has_open(
                    entry, image
                ):
                    found.append(int(entry.name))
    return found


def has_open(process: Path, image: Path) -> bool:
    """Return whether a process, by its folder in /proc, has the image or what is beside it open."""
    for handle in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            if str(handle.readlink()).startswith(str(image)):
                return True
    return False


def machine_runs(image: Path) -> bool:
    """Return whether QEMU has the redo log open."""
    for process in machines_on(image):
        with contextlib.suppress(OSError):
            if b"qemu-system" in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0]:
                return True
    return False


def told(process: subprocess.Popen[str], step: str) -> None:
    """Read what the command says until it begins this step."""
    assert process.stderr
    for line in process.stderr:
        if step in line:
            return
    pytest.fail(f"it ended before {step!r}")


def blocks_of(path: Path) -> int:
    """Return how much of a file is on the disk."""
    return path.stat().st_blocks if path.exists() else 0


def launching(_process: subprocess.Popen[str], image: Path) -> None:
    """Wait until the appliance has been started."""
    wait_until(lambda: machine_runs(image))


def inspecting(process: subprocess.Popen[str], _image: Path) -> None:
    """Wait until the guest is being mounted and read."""
    told(process, "inspecting")


def writing(process: subprocess.Popen[str], image: Path) -> None:
    """Wait until the first guest files have reached the redo log."""
    told(process, "writing")
    before = blocks_of(beside(image, OPEN))
    wait_until(lambda: process.poll() is not None or blocks_of(beside(image, OPEN)) > before)


MOMENTS = [
    pytest.param(launching, id="launching", marks=pytest.mark.slow),
    pytest.param(inspecting, id="inspecting", marks=pytest.mark.slow),
    pytest.param(writing, id="writing"),
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_before_the_seal(
    image: Path,
    moment: Callable[[subprocess.Popen[str], Path], None],
    start: Callable[..., subprocess.Popen[str]],
    run_cli: RunCli,
) -> None:
    """SIGKILL leaves the image untouched and no QEMU; recover throws the open redo log away."""
    before = file_hash(image)
    process = start("inject", image)
    moment(process, image)
    process.kill()
    process.wait()
    assert file_hash(image) == before
    assert beside(image, OPEN).exists()
    wait_until(lambda: not machines_on(image), 15)
    outcome = json.loads(run_cli("recover", image, "--json").stdout)
    assert outcome["outcome"] == "discarded"
    assert file_hash(image) == before
    assert [path.name for path in image.parent.iterdir()] == [image.name]
    assert json.loads(run_cli("recover", image, "--json").stdout)["outcome"] == "nothing"


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(
    image: Path,
    moment: Callable[[subprocess.Popen[str], Path], None],
    number: signal.Signals,
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    """Ctrl-C, which a terminal sends to all of the group, and SIGTERM end it with 130, cleanly."""
    before = state_of(image)
    process = start("inject", image, "--json")
    moment(process, image)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert state_of(image) == before
    assert process.returncode == INTERRUPTED, stderr
    assert json.loads(stdout)["error"]["kind"] == "CancelledError"
    assert "Traceback" not in stderr
    wait_until(lambda: not machines_on(image), 15)


def wrapper(folder: Path, on_commit: str) -> Path:
    """Make a folder with a ``qemu-img`` that does this for ``commit``; ``$real`` is the real."""
    folder.mkdir()
    program = folder / "qemu-img"
    real = shutil.which("qemu-img")
    program.write_text(
        f'#!/bin/sh\nreal={real}\n[ "$1" = commit ] || exec $real "$@"\n{on_commit}\n'
    )
    program.chmod(0o755)
    return folder


DYING = {
    "before": "kill -9 $PPID; exit 1",
    "after": '$real "$@"; kill -9 $PPID; exit 1',
    "failing": "echo 'No space left on device' >&2; exit 1",
}


def test_merge_holds_the_image_when_its_starter_dies(
    image: Path, tmp_path: Path, start: Callable[..., subprocess.Popen[str]], run_cli: RunCli
) -> None:
    """An orphaned ``qemu-img commit`` keeps everybody from the image until it has ended."""
    mark, go = tmp_path / "merging", tmp_path / "go"
    script = f'touch {mark}; while ! [ -e {go} ]; do sleep 0.1; done; exec $real "$@"'
    process = start("inject", image, path=wrapper(tmp_path / "bin", script))
    wait_until(mark.exists)
    process.kill()
    process.wait()
    assert run_cli("recover", image, check=False).returncode == LOCKED
    assert subprocess.run(qemu_command(image), check=False, timeout=60).returncode != 0
    go.touch()
    wait_until(lambda: not is_held(image))
    assert json.loads(run_cli("recover", image, "--json").stdout)["outcome"] == "merged"
    assert vmprovision.verify(image).mismatches == ()


@pytest.fixture(scope="session")
def half_merged(
    tiny_qcow2: Path, tmp_path_factory: pytest.TempPathFactory, run_cli: RunCli
) -> Path:
    """Return a folder with an image whose merge was killed before it wrote; tests copy it."""
    folder = tmp_path_factory.mktemp("half") / "images"
    folder.mkdir()
    image = Path(shutil.copy(tiny_qcow2, folder / "guest.qcow2"))
    path = f"{wrapper(folder.parent / 'bin', DYING['before'])}:{os.environ['PATH']}"
    assert run_cli("inject", image, check=False, env={"PATH": path}).returncode == -signal.SIGKILL
    assert beside(image, MERGING).exists()
    assert file_hash(image) == file_hash(tiny_qcow2)
    return folder


def interrupted_copy(half_merged: Path, folder: Path) -> Path:
    """Return a copy of the interrupted image and its redo log, both in the same folder."""
    target = folder / "images"
    shutil.copytree(half_merged, target)
    return target / "guest.qcow2"


def seal(image: Path) -> Path:
    """Take the redo log one step back: sealed, the merge not begun."""
    status = image.stat()
    sealed = beside(image, f"{SEALED}-{status.st_size}-{status.st_mtime_ns}")
    return beside(image, MERGING).rename(sealed)


def test_killed_before_merging(half_merged: Path, tmp_path: Path, run_cli: RunCli) -> None:
    """Recover completes a merge that was killed; verify agrees; a reader saw the result before."""
    image = interrupted_copy(half_merged, tmp_path)
    assert vmprovision.verify(image).mismatches == ()
    assert json.loads(run_cli("recover", image, "--json").stdout)["outcome"] == "merged"
    assert [path.name for path in image.parent.iterdir()] == [image.name]
    assert vmprovision.verify(image).mismatches == ()


@pytest.mark.slow
def test_next_injection_completes_a_sealed_one(half_merged: Path, tmp_path: Path) -> None:
    """The next inject merges a sealed redo log first, and then finds nothing to do."""
    image = interrupted_copy(half_merged, tmp_path)
    seal(image)
    assert vmprovision.inject(image).changed == ()
    assert [path.name for path in image.parent.iterdir()] == [image.name]


@pytest.mark.parametrize("command", ["recover", "inject", "inspect"])
def test_sealed_redo_log_of_an_image_that_changed(
    half_merged: Path, tmp_path: Path, refuse: Refuse, command: str
) -> None:
    """A redo log that does not fit any more is refused with 18, and neither file is lost."""
    image = interrupted_copy(half_merged, tmp_path)
    seal(image)
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))
    refuse(image, RECOVERY, command=command)


def test_recover_as_another_format(half_merged: Path, tmp_path: Path, refuse: Refuse) -> None:
    """Merging as raw would write over the image's own header, so it is refused."""
    image = interrupted_copy(half_merged, tmp_path)
    error = refuse(image, RECOVERY, "--format", "raw", command="recover")
    assert "qcow2" in error["hint"]


def test_redo_log_of_somebody_else(half_merged: Path, tmp_path: Path, refuse: Refuse) -> None:
    """A redo log that another user laid beside the image is not merged into it."""
    require_root()
    image = interrupted_copy(half_merged, tmp_path)
    os.chown(beside(image, MERGING), 65534, 65534)
    refuse(image, RECOVERY, command="recover")


def test_output_beside_an_interrupted_image(
    half_merged: Path, tmp_path: Path, refuse: Refuse
) -> None:
    """--output does not copy an image that is only half there."""
    image = interrupted_copy(half_merged, tmp_path)
    refuse(image, RECOVERY, "--output", tmp_path / "new.qcow2")
    assert not (tmp_path / "new.qcow2").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["after", "failing"])
def test_merge_that_breaks_off(image: Path, tmp_path: Path, run_cli: RunCli, how: str) -> None:
    """However a merge ends early, recover makes the image whole and clears up."""
    path = f"{wrapper(tmp_path / 'bin', DYING[how])}:{os.environ['PATH']}"
    done = run_cli("inject", image, "--json", check=False, env={"PATH": path})
    if how == "failing":
        check_refusal(done.returncode, done.stdout, done.stderr, image, RECOVERY)
    assert beside(image, MERGING).exists()
    assert json.loads(run_cli("recover", image, "--json").stdout)["outcome"] == "merged"
    assert vmprovision.verify(image).mismatches == ()
    assert [entry.name for entry in image.parent.iterdir()] == [image.name]


def test_image_is_held_while_it_is_written(
    image: Path, start: Callable[..., subprocess.Popen[str]], run_cli: RunCli
) -> None:
    """While an injection runs, another one and a real QEMU are kept out; it then completes."""
    process = start("inject", image, "--json")
    launching(process, image)
    process.send_signal(signal.SIGSTOP)  # or it would be done before the others have begun
    second = run_cli("inject", image, "--json", check=False)
    assert second.returncode == LOCKED, second.stderr
    qemu = subprocess.run(qemu_command(image), check=False, capture_output=True, timeout=60)
    assert qemu.returncode != 0
    assert b"lock" in qemu.stderr
    process.send_signal(signal.SIGCONT)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["changed"]
    assert [path.name for path in image.parent.iterdir()] == [image.name]


def qemu_command(image: Path) -> list[str]:
    """Return a QEMU that has the image and does not run."""
    disk = f"file={image},format=qcow2,if=virtio"
    options = ["-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "64"]
    return ["qemu-system-x86_64", *options, "-drive", disk, "-monitor", "none", "-no-user-config"]


def test_image_of_a_running_machine(image: Path, refuse: Refuse) -> None:
    """An image that a QEMU has open is neither written nor read; the message says why."""
    before = file_hash(image)
    machine = subprocess.Popen(qemu_command(image), stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: is_held(image))
        for command in ("inject", "inspect", "remove", "recover"):
            assert "running" in refuse(image, LOCKED, command=command)["message"]
    finally:
        machine.kill()
        machine.wait()
    assert file_hash(image) == before


def test_image_whose_backing_file_is_in_use(image: Path, refuse: Refuse) -> None:
    """A machine that runs on the base of a chain keeps us from the top as well."""
    top = image.with_name("top.qcow2")
    create: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"]
    subprocess.run([*create, "-b", image.name, top], check=True)
    machine = subprocess.Popen(qemu_command(image), stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: is_held(image))
        refuse(top, LOCKED)
    finally:
        machine.kill()
        machine.wait()


def is_held(image: Path) -> bool:
    """Return whether QEMU holds the image: a query, since a lock could keep QEMU from starting."""
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, *QEMU_LOCK_BYTES, 0)
    with image.open("rb") as file:
        answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, wanted)
    return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)


def test_two_threads(image: Path, tmp_path: Path) -> None:
    """Two images in two threads work side by side; of one of them the cancelling stops that one."""
    (tmp_path / "other").mkdir()
    other = Path(shutil.copy(image, tmp_path / "other" / "other.qcow2"))
    before = state_of(other)
    results: dict[str, object] = {}
    both_run = threading.Barrier(3)

    def report(progress: vmprovision.Progress) -> None:
        if progress.step == "inspecting the guest":
            both_run.wait(PATIENCE)
            both_run.wait(PATIENCE)

    kept, cancel = vmprovision.Control(report=report), vmprovision.Control(report=report)

    def work(name: str, path: Path, control: vmprovision.Control) -> None:
        try:
            results[name] = vmprovision.inject(path, control=control)
        except vmprovision.VmprovisionError as exc:
            results[name] = exc

    threads = [
        threading.Thread(target=work, args=("kept", image, kept)),
        threading.Thread(target=work, args=("cancelled", other, cancel)),
    ]
    for thread in threads:
        thread.start()
    both_run.wait(PATIENCE)
    assert machine_runs(image)
    assert machine_runs(other)
    with pytest.raises(ImageLockedError):
        vmprovision.inject(image)  # the lock holds between threads of one process as well
    cancel.cancelled.set()
    both_run.wait(PATIENCE)
    for thread in threads:
        thread.join(PATIENCE)
    assert isinstance(results["kept"], vmprovision.ChangeReport), results["kept"]
    assert results["kept"].changed
    assert isinstance(results["cancelled"], CancelledError)
    assert state_of(other) == before
    wait_until(lambda: not machines_on(other), 15)
