"""The jobs of a batch: one for each image, checked before any work begins."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.errors import ImageReferenceError, PlanError, VmprovisionError
from vmprovision.image.chain import open_chain
from vmprovision.image.diskfile import open_disk_file
from vmprovision.image.header import determine_format
from vmprovision.planning.injection import InjectOptions, check_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vmprovision.reports import ImageOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One image to inject, in the form that a worker on another host receives.

    Attributes:
        image: a disk image, or a directory with an unpacked root filesystem.
        options: what to inject.
        source: how to open the image.
        output: the new image to write instead of changing this one.
    """

    image: Path
    options: InjectOptions
    source: ImageOptions
    output: Path | None


def plan_jobs(
    images: Sequence[Path],
    options: InjectOptions | Callable[[Path], InjectOptions],
    source: ImageOptions,
    output: Path | str | None,
) -> list[Job]:
    """Return a job for each image.

    Raises:
        PlanError: two of them conflict, or the options are invalid.
    """
    if isinstance(options, InjectOptions):
        check_options(options)
    if source.disks and len(images) > 1:
        raise PlanError(
            "--disk names further disks of one guest, but several images are given",
            hint="inject each guest separately",
        )
    folder = Path(output) if output is not None else None
    if folder is not None and not folder.is_dir():
        raise PlanError(
            f"{folder} is not a directory, and several images cannot become one new file",
            hint="create the directory first",
        )
    jobs = [
        Job(
            image=image,
            options=options if isinstance(options, InjectOptions) else options(image),
            source=source,
            output=folder / image.name if folder is not None else None,
        )
        for image in images
    ]
    _refuse_twice(jobs, _identity, "are the same file", "name each image once")
    _refuse_twice(
        jobs,
        lambda job: job.options.vm_id,
        "would get the same VM id",
        "give each its own: --vm-id '{name}' uses the image's name",
    )
    _refuse_twice(
        jobs, lambda job: job.output, "would be the same new file", "rename one of the images"
    )
    return jobs


def _refuse_twice(jobs: Sequence[Job], key: Callable[[Job], object], what: str, hint: str) -> None:
    seen: dict[object, Job] = {}
    for job in jobs:
        value = key(job)
        if value is not None and seen.setdefault(value, job) is not job:
            raise PlanError(f"{seen[value].image} and {job.image} {what}", hint=hint)


def _identity(job: Job) -> object:
    """Return the identity of a file or directory, which all its names and links share."""
    try:
        status = job.image.stat()
    except OSError:
        return job.image.absolute()
    return status.st_dev, status.st_ino


def find_backing_files(jobs: Sequence[Job]) -> dict[object, Job]:
    """Return the backing files of the images of a batch, each with a job that needs it."""
    return {identity: job for job in jobs for identity in _chain(job)}


def _chain(job: Job) -> Iterator[tuple[int, int]]:
    if not job.image.is_file():
        return
    # faults of the image are reported by its own injection
    with (
        contextlib.suppress(VmprovisionError, OSError),
        open_disk_file(job.image.resolve(), write=False) as image,
    ):
        disk_format = determine_format(image, job.source.format)
        outside = job.source.allow_backing
        with open_chain(image, disk_format, allow_outside=outside, write=False) as base:
            yield from (file.identity for file in base.files()[1:])


def check_job(job: Job, backed: dict[object, Job]) -> VmprovisionError | None:
    """Return why this job cannot be done, as far as that is known without an appliance."""
    above = backed.get(_identity(job))
    if above is not None and job.output is None:
        return ImageReferenceError(
            f"{job.image} is the backing file of {above.image}: "
            "writing to it would change the content of that image",
            hint="inject only one of them",
        )
    try:
        check_options(job.options)
    except PlanError as exc:
        exc.image = job.image
        return exc
    return None


def with_absolute_paths(job: Job) -> Job:
    """Return the job with absolute paths, for a worker in another directory."""
    runtime = job.options.runtime
    if isinstance(runtime, Path):
        job = replace(job, options=replace(job.options, runtime=runtime.absolute()))
    keys = tuple(replace(key, path=key.path.absolute()) for key in job.source.keys)
    disks = tuple(disk.absolute() for disk in job.source.disks)
    job = replace(job, source=replace(job.source, keys=keys, disks=disks))
    output = job.output.absolute() if job.output else None
    return replace(job, image=job.image.absolute(), output=output)


def digest_of(job: Job, agent: str) -> str:
    """Return a digest of the agent and of all options of a job."""
    wanted = {
        "agent": agent,
        "options": {**asdict(job.options), "runtime": _runtime(job.options.runtime)},
        "source": {
            **asdict(job.source),
            "keys": (),  # the key that opens the image changes nothing in it
            "disks": [str(disk) for disk in job.source.disks],
        },
    }
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


def _runtime(choice: Path | str) -> str:
    if not isinstance(choice, Path):
        return choice
    with contextlib.suppress(OSError):  # the job itself reports it
        return hashlib.sha256(choice.read_bytes()).hexdigest()
    return str(choice)
