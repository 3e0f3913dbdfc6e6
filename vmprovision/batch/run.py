"""Inject into many images in parallel; none that fails stops another.

Every image gets an appliance of its own and one result.  The work is done by threads
of this process, since libguestfs releases Python's lock while it works, or by any
``concurrent.futures.Executor``.  Its workers may be on other hosts, so jobs and results
can be pickled.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import queue
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.api import DEFAULT_IMAGE, NO_OPTIONS, inject
from vmprovision.appliance.shared import SharedAppliances
from vmprovision.appliance.snapshot.host import STOCK_VARIABLE, find_host_appliance
from vmprovision.batch.jobs import (
    check_job,
    digest_of,
    find_backing_files,
    plan_jobs,
    with_absolute_paths,
)
from vmprovision.batch.journal import open_journal
from vmprovision.errors import (
    ApplianceError,
    CancelledError,
    FleetError,
    ImageLockedError,
    PlanError,
    VmprovisionError,
    unexpected_error,
)
from vmprovision.host.capacity import host_capacity
from vmprovision.image.recovery import is_being_merged
from vmprovision.progress import Control, Progress
from vmprovision.reports import BatchReport, JobResult
from vmprovision.runtime.archive import build_archive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vmprovision.appliance.session import Appliances
    from vmprovision.batch.jobs import Job
    from vmprovision.batch.journal import Journal
    from vmprovision.planning.injection import InjectOptions
    from vmprovision.reports import ChangeReport, ImageOptions

log = logging.getLogger(__name__)

# Peak memory of an appliance without KVM: libguestfs's own, and a restored one.
STOCK_MEMORY, RESTORED_MEMORY = 600 << 20, 200 << 20
MERGE_PATIENCE = 600.0
POLL_SECONDS = 0.2


def inject_many(  # noqa: PLR0913 -- inject's options, and those of a batch
    images: Sequence[Path | str],
    options: InjectOptions | Callable[[Path], InjectOptions] = NO_OPTIONS,
    *,
    source: ImageOptions = DEFAULT_IMAGE,
    output: Path | str | None = None,
    jobs: int | None = None,
    together: bool = False,
    executor: concurrent.futures.Executor | None = None,
    journal: Path | str | None = None,
    control: Control | None = None,
) -> BatchReport:
    """Install the agent in many guests; return one result per image, in the order given.

    An image that fails does not stop the others, and each is afterwards either finished
    or unchanged to the byte.  An image that is the backing file of another one in the
    batch fails, because writing to it would change the content of the other.

    Args:
        images: disk images, or directories with an unpacked root filesystem.
        options: what to inject, or a function that returns it for each image; the
            function is called in this process, before the work begins.
        source: how to open the images.
        output: keep the images and write new ones with the same names into this directory.
        jobs: how many images at once on this host; by default as many as its cores and
            free memory allow.
        together: let one appliance work on several images in turn. This is faster, but
            only for images of one owner: a guest that took over the appliance through a
            fault in its kernel could reach the images that follow.
        executor: does the work instead of threads of this process. Its workers must
            find the images under the same paths. It is not shut down.
        journal: a file that records finished images, created if it does not exist;
            images that it lists as finished with the same options are skipped.
        control: progress, with ``Progress.image``, one call at a time; cancelling
            stops running injections and starts no more. An executor's worker may finish
            the image that it has begun.

    Raises:
        PlanError: before any work, if two images are the same file or would get the
            same VM id or the same new name, if an option is invalid, or if the file is
            not a journal. Later failures are in the results.
    """
    planned = plan_jobs([Path(image) for image in images], options, source, output)
    if jobs is not None and jobs < 1:
        raise PlanError(f"--jobs must be at least 1, not {jobs}", hint="give 1 or more")
    if together and executor is not None:
        raise PlanError(
            "only appliances of this host can work on several images in turn",
            hint="leave out either --together or the executor or scheduler",
        )
    with contextlib.ExitStack() as stack:
        book = None
        if journal is not None:
            book = open_journal(Path(journal))
            stack.callback(book.close)
        batch = _Batch(planned, book, control or Control())
        batch.settle()
        if executor is None:
            workers = jobs or host_capacity().workers(_memory_of_each())
            shared = SharedAppliances() if together else None
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))
            if shared is not None:
                stack.callback(shared.close)
            batch.work(lambda job: pool.submit(do_job, job, batch.control_of(job), shared))
        else:
            batch.work(lambda job: executor.submit(do_job_elsewhere, with_absolute_paths(job)))
        return BatchReport(results=tuple(batch.results[job] for job in planned))


def _memory_of_each() -> int:
    """Return how much memory the appliance of one image takes: less if it is a saved one."""
    if not os.environ.get(STOCK_VARIABLE):
        with contextlib.suppress(ApplianceError):
            return RESTORED_MEMORY if find_host_appliance() else STOCK_MEMORY
    return STOCK_MEMORY


def do_job(job: Job, control: Control, appliances: Appliances | None) -> JobResult:
    """Inject into one image; return how that ended, whatever exception it raised."""
    return _result_of(job, lambda: _inject(job, control, appliances))


def do_job_elsewhere(job: Job) -> JobResult:
    """Inject into one image in a worker of an executor, possibly after another worker tried.

    A worker that was killed while merging leaves a ``qemu-img`` that locks the image
    until it ends; wait for it.

    Raises:
        ApplianceError: this worker's host failed, so that the executor can retry elsewhere.
    """
    result = _result_of(job, lambda: _inject_after_merge(job))
    if isinstance(result.error, ApplianceError):
        raise result.error
    return result


def _inject(job: Job, control: Control, appliances: Appliances | None = None) -> ChangeReport:
    return inject(
        job.image,
        job.options,
        source=job.source,
        output=job.output,
        pool=appliances,
        control=control,
    )


def _inject_after_merge(job: Job) -> ChangeReport:
    deadline = time.monotonic() + MERGE_PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(ImageLockedError):
            return _inject(job, Control())
        if not is_being_merged(job.image):
            break
        log.info("%s is still being merged by the qemu-img of an earlier worker", job.image)
        time.sleep(POLL_SECONDS)
    return _inject(job, Control())


def _result_of(job: Job, work: Callable[[], ChangeReport]) -> JobResult:
    begun = time.monotonic()
    result = JobResult(image=job.image, outcome="failed")
    try:
        report = _without_rules(work())
        result = replace(
            result,
            outcome="injected" if report.changed or job.output else "unchanged",
            report=report,
        )
    except CancelledError as exc:
        result = replace(result, outcome="cancelled", error=exc)
    except VmprovisionError as exc:
        result = replace(result, error=exc)
    except Exception as exc:  # one image's fault must not stop the others
        log.debug("%s: unexpected", job.image, exc_info=exc)
        fault = unexpected_error(exc)
        fault.image = job.image
        result = replace(result, error=fault)
    return replace(result, seconds=time.monotonic() - begun)


def _without_rules(report: ChangeReport) -> ChangeReport:
    selinux = report.guest.selinux
    if selinux is None:
        return report
    return replace(report, guest=replace(report.guest, selinux=replace(selinux, contexts=None)))


class _Batch:
    """The results so far, the journal, and reporting to the caller."""

    def __init__(self, jobs: Sequence[Job], journal: Journal | None, control: Control) -> None:
        self.results: dict[Job, JobResult] = {}
        self._jobs = jobs
        self._journal = journal
        self._control = control
        self._stopped = threading.Event()
        self._one_at_a_time = threading.Lock()
        agent = build_archive().sha256
        self._wanted = {job: digest_of(job, agent) for job in jobs} if journal else {}

    def control_of(self, job: Job) -> Control:
        """Return the control of a job that runs in a thread of this process."""
        return Control(
            report=lambda progress: self._report(replace(progress, image=job.image)),
            cancelled=self._stopped,
        )

    def settle(self) -> None:
        """Record the results of jobs that need no work."""
        backed = find_backing_files(self._jobs)
        for job in self._jobs:
            if self._journal and self._journal.holds(job.output or job.image, self._wanted[job]):
                self._end(job, JobResult(image=job.image, outcome="skipped"))
            elif error := check_job(job, backed):
                self._end(job, JobResult(image=job.image, outcome="failed", error=error))

    def work(self, submit: Callable[[Job], concurrent.futures.Future[JobResult]]) -> None:
        """Submit all other jobs; return when the last one has ended."""
        running: dict[concurrent.futures.Future[JobResult], Job] = {}
        ended: queue.SimpleQueue[concurrent.futures.Future[JobResult]] = queue.SimpleQueue()
        try:
            for job in self._jobs:
                if job not in self.results:
                    future = _submitted(submit, job)
                    running[future] = job
                    future.add_done_callback(ended.put)
            while running:
                with contextlib.suppress(queue.Empty):
                    future = ended.get(timeout=POLL_SECONDS)
                    job = running.pop(future)
                    self._end(job, self._result(job, future))
                if self._control.cancelled.is_set() and not self._stopped.is_set():
                    self._stop(running)
        except BaseException:
            self._stop(running)
            raise

    def _stop(self, running: Iterable[concurrent.futures.Future[JobResult]]) -> None:
        """Stop running jobs of this process; cancel those that have not begun."""
        self._stopped.set()
        for future in running:
            future.cancel()

    def _result(self, job: Job, future: concurrent.futures.Future[JobResult]) -> JobResult:
        if not future.cancelled() and not future.exception():
            result = future.result()
            report = result.report
            if report and not job.output:
                report = replace(report, image=job.image)
            return replace(result, image=job.image, report=report)
        if self._stopped.is_set() and future.cancelled():
            error: VmprovisionError = CancelledError(
                f"{job.image}: cancelled", hint="run the same command again to continue"
            )
            return JobResult(image=job.image, outcome="cancelled", error=error)
        cause = None if future.cancelled() else future.exception()
        if isinstance(cause, VmprovisionError):
            error = cause
        else:
            error = FleetError(
                f"{job.image}: the worker that processed it was lost"
                + (f": {type(cause).__name__}: {cause}" if cause else ""),
                hint="run the same command again: finished images are not changed again",
            )
        return JobResult(image=job.image, outcome="failed", error=error)

    def _end(self, job: Job, result: JobResult) -> None:
        self.results[job] = result
        if self._journal and result.outcome in ("injected", "unchanged"):
            try:
                self._journal.add(job.output or job.image, self._wanted[job])
            except OSError as exc:
                log.warning("the journal %s cannot be written: %s", self._journal.path, exc)
        self._report(
            Progress(step=result.outcome, fraction=1.0, image=job.image, outcome=result.outcome)
        )

    def _report(self, progress: Progress) -> None:
        with self._one_at_a_time:
            self._control.report(progress)


def _submitted(
    submit: Callable[[Job], concurrent.futures.Future[JobResult]], job: Job
) -> concurrent.futures.Future[JobResult]:
    """Submit a job; return a failed future if the executor takes no more work."""
    try:
        return submit(job)
    except Exception as exc:  # noqa: BLE001 -- each executor has its own, and Dask's has no base
        broken: concurrent.futures.Future[JobResult] = concurrent.futures.Future()
        broken.set_exception(exc)
        return broken
