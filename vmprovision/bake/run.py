"""The straight line of a bake: fetch, check, inject, verify, prove, convert, describe.

All work is done in a private folder beside the output folder. It gets the output
folder's name when it is complete. So a failed bake leaves no output, and the output of
an earlier bake stays unchanged.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.api import inject, list_contents, plan
from vmprovision.bake.convert import write_output
from vmprovision.bake.describe import Bake, describe_bake
from vmprovision.bake.fetch import check_source, obtain_source
from vmprovision.bake.files import put_in_place, sync_tree, writing
from vmprovision.bake.loading import load_bake_file
from vmprovision.bake.options import inject_options, proof_options
from vmprovision.bake.results import BakeOptions, BakeOutcome, BakeResult, Step
from vmprovision.bake.store import (
    copy_folder,
    find_cached,
    holds_bake,
    keep,
    key_in,
    lock_of,
    make_key,
)
from vmprovision.errors import (
    BakeFileError,
    CancelledError,
    ImageError,
    PlanError,
    VerificationError,
    VmprovisionError,
    unexpected_error,
)
from vmprovision.host.cache import locked
from vmprovision.host.capacity import host_capacity
from vmprovision.host.workspace import make_workspace_in
from vmprovision.progress import Control, Progress
from vmprovision.proof.prove import prove
from vmprovision.reports import ImageOptions
from vmprovision.runtime.archive import build_archive

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmprovision.bake.loading import LoadedBakeFile
    from vmprovision.planning.injection import InjectOptions
    from vmprovision.runtime.archive import Archive

log = logging.getLogger(__name__)

MEMORY = 800 << 20  # peak memory of a bake, while the guest boots


@dataclass(slots=True, kw_only=True)
class _Course:
    """The progress of a bake, so that an error can name its step and line."""

    control: Control
    loaded: LoadedBakeFile | None = None
    folder: Path | None = None
    key: str | None = None
    at: tuple[str | int, ...] = ()
    proof: float | None = None
    steps: list[Step] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, name: str, *about: str | int) -> Iterator[None]:
        """Time a step; an error in it is about this key of the bake file."""
        self.at = about
        self.control.step(name)
        begun = time.monotonic()
        yield
        self.steps.append(Step(name=name, seconds=time.monotonic() - begun))

    def result(self, file: Path, outcome: BakeOutcome) -> BakeResult:
        """Return the result so far."""
        loaded = self.loaded
        return BakeResult(
            file=file,
            outcome=outcome,
            folder=self.folder,
            key=self.key,
            steps=tuple(self.steps),
            proof=self.proof,
            images=tuple(each.file_name(loaded.name) for each in loaded.bake.output)
            if loaded
            else (),
        )

    def line(self) -> int | None:
        """Return the line that the current step is about."""
        return self.loaded.line_of(*self.at) if self.loaded else None


def bake(
    file: Path | str, options: BakeOptions | None = None, *, control: Control | None = None
) -> BakeResult:
    """Bake one file and return its result; never raise an exception."""
    path, course = Path(file), _Course(control=control or Control())
    begun = time.monotonic()
    outcome: BakeOutcome = "failed"
    error: VmprovisionError | None = None
    try:
        outcome = _bake(path, options or BakeOptions(), course)
    except CancelledError as exc:
        outcome, error = "cancelled", exc
    except VmprovisionError as exc:
        error = exc
    except Exception as exc:  # one file's fault must not stop the others
        log.debug("%s: unexpected", path, exc_info=exc)
        error = unexpected_error(exc)
    line = course.line()
    if isinstance(error, BakeFileError) and error.problems:
        line = error.problems[0][0]
    return replace(
        course.result(path, outcome),
        error=error,
        line=line if error else None,
        seconds=time.monotonic() - begun,
    )


def bake_many(
    files: Sequence[Path],
    options: BakeOptions | None = None,
    *,
    jobs: int | None = None,
    control: Control | None = None,
) -> tuple[BakeResult, ...]:
    """Bake several files in parallel; one that fails does not stop the others.

    Args:
        files: bake files, each with its own output folder.
        options: the options for all of them.
        jobs: how many at once; by default as many as this host's cores and memory allow.
        control: progress, with ``Progress.image``, one call at a time; and cancellation.

    Raises:
        PlanError: two of the files have the same output folder, or ``jobs`` is below 1.
    """
    options, control = options or BakeOptions(), control or Control()
    if jobs is not None and jobs < 1:
        raise PlanError(f"--jobs must be at least 1, not {jobs}", hint="give 1 or more")
    folders: dict[Path, Path] = {}
    for file in files:
        folder = _output_folder(file, options)
        if folder in folders:
            raise PlanError(
                f"{folders[folder]} and {file} have the same output folder {folder}",
                hint="rename one of them",
            )
        folders[folder] = file
    one_at_a_time = threading.Lock()

    def report(progress: Progress) -> None:
        with one_at_a_time:
            control.report(progress)

    def work(file: Path) -> BakeResult:
        own = Control(
            report=lambda progress: report(replace(progress, image=file)),
            cancelled=control.cancelled,
        )
        result = bake(file, options, control=own)
        outcome = result.outcome
        report(Progress(step=outcome, fraction=1.0, image=file, outcome=outcome))
        return result

    workers = jobs or host_capacity().workers(MEMORY)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return tuple(pool.map(work, files))


def find_bake_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return the named bake files, and those in the named directories.

    Raises:
        BakeFileError: a directory has none.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.toml"))
            if not inside:
                raise BakeFileError(f"the directory {path} has no bake file (*.toml)")
            found += inside
        else:
            found.append(path)
    return tuple(dict.fromkeys(found))


def _output_folder(file: Path, options: BakeOptions) -> Path:
    place = options.output.absolute() if options.output else file.absolute().parent
    return place / file.stem


def _bake(path: Path, options: BakeOptions, course: _Course) -> BakeOutcome:
    control = course.control
    control.step("reading the bake file")
    course.loaded = loaded = load_bake_file(path)
    course.folder = folder = _output_folder(path, options)
    course.at = ("agent",)
    wanted = inject_options(loaded)
    archive = build_archive()
    course.at = ("source",)
    course.key = key = make_key(loaded, wanted, archive)
    course.at = ("output",)
    _require_replaceable(folder)
    if not options.refresh and holds_bake(folder, key, control):
        return "current"
    if options.check:
        return "outdated"
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        waiting = "waiting for another bake of the same image"
        with (
            locked(lock_of(key), lambda: control.step(waiting)),
            _private_folder(folder) as private,
        ):
            finished = private / "finished"
            cached = None if options.refresh else find_cached(key, control)
            if cached is not None:
                copy_folder(cached, finished)
            else:
                finished.mkdir()
                _make(loaded, wanted, archive, private, course)
                control.step("storing the bake in the cache")
                sync_tree(finished)
                keep(finished, key)
            put_in_place(finished, folder)
            return "cached" if cached is not None else "baked"


@contextlib.contextmanager
def _private_folder(folder: Path) -> Iterator[Path]:
    workspace = make_workspace_in(folder.parent, f".vmprovision-bake-{folder.name}-")
    try:
        yield workspace.path
    finally:
        workspace.remove()


def _require_replaceable(folder: Path) -> None:
    """Refuse to replace a folder that no bake has made.

    Raises:
        ImageError: something else is at the output folder's path.
    """
    if (folder.exists() or folder.is_symlink()) and (folder.is_symlink() or key_in(folder) is None):
        raise ImageError(
            f"{folder} exists and was not made by a bake",
            hint="remove it, or give another place with --output",
        )


def _make(
    loaded: LoadedBakeFile,
    wanted: InjectOptions,
    archive: Archive,
    private: Path,
    course: _Course,
) -> None:
    """Make everything that belongs into the output folder."""
    bake_file, control = loaded.bake, course.control
    source = ImageOptions(format=bake_file.source.format, root=bake_file.source.root)
    begun = datetime.now(timezone.utc)
    origin = "recipe" if bake_file.source.recipe else "url" if bake_file.source.url else "image"
    with course.step("fetch", "source", origin):
        image = obtain_source(loaded, private, control)
    with course.step("check", "source", "sha256"):
        sha256 = check_source(loaded, image, control)
        course.at = ("source",)
        planned = plan(image, wanted, source=source, control=control)
    with course.step("inject", "agent"):
        changed = inject(image, wanted, source=source, control=control)
    with course.step("verify", "agent"):
        contents = list_contents(image, source=source, control=control)
        if mismatches := contents.verification.mismatches:
            raise VerificationError(
                f"the image of {loaded.path} differs from its receipt: {mismatches[0]}",
                mismatches=mismatches,
            )
    has_secret = wanted.token is not None or wanted.read_token is not None
    proof = None
    if bake_file.prove is not None:
        with course.step("prove", "prove"):
            proof = prove(image, proof_options(loaded), source=source, control=control)
            course.proof = round(proof.seconds, 1)
    finished = private / "finished"
    with course.step("convert", "output"):
        for number, output in enumerate(bake_file.output):
            course.at = ("output", number)
            write_output(
                image,
                source.format,
                output,
                finished / output.file_name(loaded.name),
                architecture=contents.guest.arch,
                control=control,
            )
    with course.step("describe"):
        describe_bake(
            Bake(
                loaded=loaded,
                key=str(course.key),
                source_sha256=sha256,
                archive=archive,
                planned=planned,
                changed=changed,
                contents=contents,
                proof=proof,
                begun=begun,
                seconds={step.name: step.seconds for step in course.steps},
                mode=0o600 if has_secret else image.stat().st_mode & 0o777,
            ),
            finished,
            control,
        )
