"""One kill: start a real command, kill a process, and examine the image.

A case names a target, an action, a victim and a moment.  ``carry_out`` kills, then does
what a user would do (``recover``, the same command again), and looks for every fault
that the user could meet.  The moment is a step that the command reports, and a fraction
of the time that this step takes without a kill.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import vmprovision
from tests.conftest import locked
from tests.image.conftest import file_hash
from tests.image.tiny import tiny_disk
from tests.trees import SYSTEMD_TREE, make_tree, tree_state
from vmprovision.appliance.shared import SharedAppliances
from vmprovision.errors import ImageLockedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Target = Literal["qcow2", "raw", "directory"]
Action = Literal["inject", "remove", "output", "batch"]
Victim = Literal["command", "group", "QEMU", "qemu-img"]

PATIENCE = 300.0  # seconds; a loaded host without KVM
ENDING = 60.0  # seconds that a process has to end after its starter was killed
STEPS = (
    "checking the image",
    "starting the appliance",
    "inspecting the guest",
    "writing",
    "verifying",
    "merging the redo log",
)
WHOLE = "any moment"  # of a batch, which reports no steps of its images
LAST_STEP: dict[Action, str] = {"output": "writing the new image"}
MERGE_SUFFIXES = (".vmprovision-sealed", ".vmprovision-merging")
BATCH_SIZE = 3
NOTHING_TO_REMOVE = 40  # the exit code: what was killed had already done its work
OWN_CACHE = f".guestfs-{os.geteuid()}"  # libguestfs's, which it keeps from run to run


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A victim, the moment of its death, and the work that it is killed at.

    Attributes:
        number: its number in the run.
        step: the kill comes after this step begins.
        part: how far into this step, as a fraction of its usual length.
    """

    number: int
    target: Target
    action: Action
    victim: Victim
    step: str
    part: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one case.

    Attributes:
        moment: the last step that the command reported before the kill; empty if the
            victim never ran, so that nothing was killed.
        state: the state of the images: ``untouched``, ``pending`` (a finished redo log
            beside it) or ``finished``; of several images, the first that applies.
        faults: what a user would report, one sentence each; empty is right.
    """

    case: Case
    moment: str
    state: str
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Originals:
    """The guests whose copies the cases work on, and the length of each step.

    Attributes:
        folder: holds ``plain.raw``, ``plain.qcow2``, ``plain`` and the same with the agent.
            Processes that run cases at the same time share it.
        appliances: look at the images after the kills, one after another.
    """

    folder: Path
    appliances: SharedAppliances

    def path(self, target: Target, *, injected: bool) -> Path:
        """Return the original of a target, with the agent or without."""
        name = "injected" if injected else "plain"
        return self.folder / (name if target == "directory" else f"{name}.{target}")

    def lengths(self, target: Target, action: Action) -> dict[str, float]:
        """Return the seconds of each step of this work, which is timed when first asked for."""
        kept = self.folder / f"{target}-{action}.json"
        with locked(kept.with_suffix(".lock")):
            if not kept.exists():
                case = Case(
                    number=0, target=target, action=action, victim="command", step="", part=0
                )
                scene = _Scene(case, self, self.folder / f"timed-{target}-{action}")
                kept.write_text(json.dumps(scene.timed()))
                shutil.rmtree(scene.folder)
            lengths: dict[str, float] = json.loads(kept.read_text())
        return lengths


@contextlib.contextmanager
def made_originals(folder: Path) -> Iterator[Originals]:
    """Give the guests, one of each kind injected; make them, unless another process has."""
    with contextlib.closing(SharedAppliances()) as appliances:
        originals = Originals(folder=folder, appliances=appliances)
        with locked(folder.with_suffix(".lock")):
            if not folder.exists():
                _make_guests(originals)
        yield originals


def _make_guests(originals: Originals) -> None:
    originals.folder.mkdir(parents=True)
    raw = tiny_disk(originals.path("raw", injected=False), {})
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
    subprocess.run([*convert, raw, originals.path("qcow2", injected=False)], check=True)
    make_tree(originals.path("directory", injected=False), SYSTEMD_TREE)
    for target in ("raw", "qcow2", "directory"):
        injected = originals.path(target, injected=True)
        _copy(originals.path(target, injected=False), injected)
        vmprovision.inject(injected, source=_source(injected))


def kinds() -> list[tuple[Target, Action]]:
    """Return every target with every action that it knows."""
    targets: tuple[Target, ...] = ("qcow2", "raw")
    actions: tuple[Action, ...] = ("inject", "remove", "output", "batch")
    return [*itertools.product(targets, actions), ("directory", "inject"), ("directory", "remove")]


def draw_cases(count: int, seed: int) -> list[Case]:
    """Return cases with all kinds of work, victims and steps evenly among them.

    Args:
        count: how many.
        seed: of the order and of the fractions of a step; the same seed gives the same cases.
    """
    chance = random.Random(seed)
    combinations = [
        (target, action, victim, step)
        for target, action in kinds()
        for victim in _victims(target)
        for step in _steps(target, action)
        if victim != "qemu-img" or step in (STEPS[0], STEPS[-1], LAST_STEP["output"])
        if victim != "QEMU" or step not in (STEPS[0], STEPS[-1], LAST_STEP["output"])
    ]
    chance.shuffle(combinations)
    return [
        Case(
            number=number,
            target=target,
            action=action,
            victim=victim,
            step=step,
            part=chance.random(),
        )
        for number, (target, action, victim, step) in zip(
            range(count), itertools.cycle(combinations), strict=False
        )
    ]


def _victims(target: Target) -> tuple[Victim, ...]:
    return (
        ("command", "group") if target == "directory" else ("command", "group", "QEMU", "qemu-img")
    )


def _steps(target: Target, action: Action) -> tuple[str, ...]:
    if target == "directory":
        return STEPS[2:5]
    if action == "batch":
        return (WHOLE,) * 3
    return (*STEPS[:-1], LAST_STEP.get(action, STEPS[-1]))


def carry_out(case: Case, originals: Originals, folder: Path) -> Outcome:
    """Kill once, and examine everything that a user could see."""
    scene = _Scene(case, originals, folder)
    try:
        moment = scene.kill()
        state = scene.look()
        scene.go_on()
    except vmprovision.VmprovisionError as exc:
        scene.faults.append(f"{type(exc).__name__}: {exc}")
        return Outcome(case=case, moment="?", state="?", faults=tuple(scene.faults))
    return Outcome(case=case, moment=moment, state=state, faults=tuple(scene.faults))


class _Scene:
    """One case's folder, and the work in it."""

    def __init__(self, case: Case, originals: Originals, folder: Path) -> None:
        self.case, self.originals, self.folder = case, originals, folder
        self.faults: list[str] = []
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        (folder / "images").mkdir()
        self.original = originals.path(case.target, injected=case.action == "remove")
        suffix = "" if case.target == "directory" else f".{case.target}"
        count = BATCH_SIZE if case.action == "batch" else 1
        self.images = [folder / "images" / f"guest{number}{suffix}" for number in range(count)]
        for image in self.images:
            _copy(self.original, image)
        self.new = folder / "images" / f"new{suffix}"

    # the work

    def _command(self) -> list[str | Path]:
        verb = "remove" if self.case.action == "remove" else "inject"
        words: list[str | Path] = [sys.executable, "-m", "vmprovision", verb, *self.images]
        if self.case.target == "raw":
            words += ["--format", "raw"]
        if self.case.action == "output":
            words += ["--output", self.new]
        return words

    @contextlib.contextmanager
    def _started(self) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            self._command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(self.temporary)},
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stderr:
                process.stderr.close()

    def timed(self) -> dict[str, float]:
        """Return how many seconds each step takes without a kill."""
        start = time.monotonic()
        begun: dict[str, float] = {}
        with self._started() as process:
            assert process.stderr
            for line in process.stderr:
                if step := _step_in(line):
                    begun.setdefault(step, time.monotonic())
            assert process.wait() == 0, f"{self._command()} failed"
        ends = [*list(begun.values())[1:], time.monotonic()]
        return {
            WHOLE: time.monotonic() - start,
            **{step: end - begin for (step, begin), end in zip(begun.items(), ends, strict=False)},
        }

    # the kill

    def kill(self) -> str:
        """Kill the victim; return the last step reported by then, empty if it never ran."""
        steps: list[str] = []
        lengths = self.originals.lengths(self.case.target, self.case.action)
        with self._started() as process:
            listener = threading.Thread(target=_listen, args=(process, steps))
            listener.start()
            if self.case.step != WHOLE:
                _wait(lambda: self.case.step in steps or process.poll() is not None, PATIENCE)
            time.sleep(self.case.part * lengths.get(self.case.step, 0.1))
            struck = self._strike(process)
            moment = (steps[-1] if steps else WHOLE) if struck else ""
            if self.case.victim in ("QEMU", "qemu-img") or not moment:
                self._await_end(process)
            else:
                process.wait()
        listener.join()
        if not _wait(lambda: not _holders(self.folder), ENDING, pause=0.05):
            self.faults.append("a process still has the image open")
        return moment

    def _strike(self, process: subprocess.Popen[str]) -> bool:
        """Kill the victim; return whether it ran."""
        while process.poll() is None:
            if self.case.victim == "command":
                process.kill()
                return True
            if self.case.victim == "group":
                os.killpg(process.pid, signal.SIGKILL)
                return True
            program = "qemu-system" if self.case.victim == "QEMU" else "qemu-img"
            for pid in _holders(self.folder):
                if _program(pid).startswith(program):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        return True
            time.sleep(0.002)
        return False

    def _await_end(self, process: subprocess.Popen[str]) -> None:
        try:
            # it may begin again with a stock appliance, which a loaded host boots slowly
            process.wait(PATIENCE + ENDING)
        except subprocess.TimeoutExpired:
            self.faults.append("the command did not end after its QEMU was killed")

    # the look

    def look(self) -> str:
        """Return the state of the images, before anything repairs them."""
        if self.case.target == "directory":
            return "untouched" if self._is_original(self.images[0]) else "pending"
        if self.case.action == "output":
            if not self._is_original(self.images[0]):
                self.faults.append("the source of --output was changed")
            return "finished" if self.new.exists() else "untouched"
        states = {self._state(image) for image in self.images}
        return next(state for state in ("untouched", "pending", "finished") if state in states)

    def _state(self, image: Path) -> str:
        names = [path.name for path in image.parent.iterdir()]
        if any(name.startswith(image.name + suffix) for name in names for suffix in MERGE_SUFFIXES):
            return "pending"
        return "untouched" if self._is_original(image) else "finished"

    def _is_original(self, image: Path) -> bool:
        if self.case.target == "directory":
            return tree_state(image) == tree_state(self.original)
        return file_hash(image) == file_hash(self.original)

    # what a user does next

    def go_on(self) -> None:
        """Recover, examine, run the command again, and examine once more."""
        if self.case.target == "directory":
            self._go_on_with_directory()
            return
        for image in self.images:
            _recover(image)
            if self._state(image) == "finished":
                self._judge(image)
        if self.new.exists():
            self._judge(self.new)
            self.new.unlink()
        self._run_again()
        for image in [self.new] if self.case.action == "output" else self.images:
            self._judge(image)
        expected = {*self.images, *([self.new] if self.case.action == "output" else [])}
        if left := set((self.folder / "images").iterdir()) - expected:
            self.faults.append(f"left beside the image: {sorted(path.name for path in left)}")
        if entries := {path.name for path in self.temporary.iterdir()} - {OWN_CACHE}:
            self.faults.append(f"left in TMPDIR: {sorted(entries)}")

    def _run_again(self) -> None:
        with self._started() as process:
            assert process.stderr
            said = process.stderr.read()
            code = process.wait(PATIENCE)
            if code and not (self.case.action == "remove" and code == NOTHING_TO_REMOVE):
                self.faults.append(f"run again: exit code {code}: {said[-500:]}")

    def _go_on_with_directory(self) -> None:
        image = self.images[0]
        other = self.folder / "images" / "other"
        _copy(image, other)
        with contextlib.suppress(vmprovision.PlanError):  # killed before anything was written
            vmprovision.remove(other)
        if tree_state(other) != tree_state(self.originals.path("directory", injected=False)):
            self.faults.append("remove after the kill does not bring back the original")
        self._run_again()
        wanted = self.originals.path("directory", injected=self.case.action == "inject")
        if tree_state(image) != tree_state(wanted):
            self.faults.append("the same command again ends otherwise than without the kill")

    def _judge(self, image: Path) -> None:
        """Add a fault if the image's filesystem, metadata or agent is wrong."""
        raw = image
        if image.suffix == ".qcow2":
            self._check("qemu-img", "check", "-q", image)
            raw = self.folder / "judged.raw"
            self._check("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
        self._check("e2fsck", "-fn", raw)
        source, pool = _source(image), self.originals.appliances
        if self.case.action == "remove":
            if vmprovision.inspect(image, source=source, pool=pool).agent is not None:
                self.faults.append(f"the agent is still in {image.name}")
        elif mismatches := vmprovision.verify(image, source=source, pool=pool).mismatches:
            self.faults.append(f"verify of {image.name}: {mismatches}")

    def _check(self, *command: str | Path) -> None:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=PATIENCE,
            env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
        )
        if done.returncode:
            self.faults.append(f"{command[0]}: {(done.stdout + done.stderr)[-300:]}")


def _recover(image: Path) -> None:
    """Recover as a user does, who tries again while a killed process is still ending."""
    deadline = time.monotonic() + ENDING
    while True:
        try:
            vmprovision.recover(image, source=_source(image))
        except ImageLockedError:  # noqa: PERF203 -- it is asked again, a few times
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def _source(image: Path) -> vmprovision.ImageOptions:
    return vmprovision.ImageOptions(format="raw" if image.suffix == ".raw" else None)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copyfile(source, target)


def _listen(process: subprocess.Popen[str], steps: list[str]) -> None:
    assert process.stderr
    with contextlib.suppress(ValueError):  # it was closed
        for line in process.stderr:
            if step := _step_in(line):
                steps.append(step)  # noqa: PERF401 -- the kill waits for each as it comes


def _step_in(line: str) -> str:
    """Return the step that a line of standard error reports; of a batch, of any of its images."""
    return next((step for step in (*STEPS, *LAST_STEP.values()) if step in line), "")


def _wait(condition: Callable[[], object], seconds: float, pause: float = 0.005) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def _holders(folder: Path) -> list[int]:
    """Return the other processes that have a file of the folder open or on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if str(folder).encode() in (entry / "cmdline").read_bytes() or any(
                    _leads_to(handle, folder) for handle in (entry / "fd").iterdir()
                ):
                    found.append(int(entry.name))
    return found


def _leads_to(handle: Path, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return str(handle.readlink()).startswith(f"{folder}/")
    return False


def _program(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return os.fsdecode(words[0]).rsplit("/", 1)[-1]
    return ""
