"""Run a command's work, print its result, and end with the right exit code.

Reports go to standard output, as text or with ``--json`` as one JSON object. Progress,
logs and errors go to standard error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from vmprovision import errors
from vmprovision.cli.console import STDERR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vmprovision import Control
    from vmprovision.appliance.session import Appliances
    from vmprovision.cli.progress_lines import Display

Result = TypeVar("Result")

POLL_SECONDS = 0.2
TURN_SECONDS = 0.0005


def work_on(
    image: Path, job: Callable[[Control, Appliances | None], Result], *, as_json: bool
) -> Result:
    """Return the result of a job on an image, as ``work`` does.

    The appliance for it is restored while the main thread imports what the job needs.

    Args:
        image: the image, or a directory.
        job: gets the appliance, too.
        as_json: print an error as JSON.
    """
    is_imported = threading.Event()

    def started(control: Control) -> Result:
        try:
            from vmprovision.appliance.ahead import ApplianceAhead
        finally:
            is_imported.set()
        if not image.is_file():
            return job(control, None)
        with contextlib.closing(ApplianceAhead(control)) as ahead:
            return job(control, ahead)

    def import_the_rest() -> None:
        is_imported.wait()  # else both imports take turns, and the restore begins later
        importlib.import_module("vmprovision.api")

    return work(started, as_json=as_json, meanwhile=import_the_rest)


def work(
    job: Callable[[Control], Result],
    *,
    as_json: bool,
    display: Display | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Result:
    """Return the result of a job, which runs in a thread; end the program if it fails.

    The main thread has to stay free: only it handles Ctrl-C, and libguestfs blocks the thread
    that calls it.

    Args:
        job: the job.
        as_json: print an error as JSON.
        display: shows the progress; by default, that of one image.
        meanwhile: called in the main thread when the job has begun.
    """
    import concurrent.futures
    import signal

    from vmprovision import Control
    from vmprovision.cli.progress_lines import single_display

    shown = display or single_display()
    control = Control(report=shown.report)
    previous = {
        number: signal.signal(number, lambda *_: control.cancelled.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with shown, concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(job, control)
            with _short_turns():
                meanwhile()
            while not concurrent.futures.wait([future], timeout=POLL_SECONDS).done:
                pass
            return future.result()
    except errors.VmprovisionError as exc:
        fail(exc, as_json=as_json)
    except Exception as exc:
        import logging

        logging.getLogger(__name__).debug("unexpected", exc_info=exc)
        fail(errors.unexpected_error(exc), as_json=as_json)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _short_turns() -> Iterator[None]:
    """Let no thread keep Python's lock for long while the block runs."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def present(document: dict[str, Any], show: Callable[[], None], *, as_json: bool) -> None:
    """Print a report: its JSON form, or whatever ``show`` prints."""
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()
    else:
        show()


def write_report(path: Path, content: bytes) -> int:
    """Write a report into a file; return the exit code, after an error message if it fails."""
    from vmprovision.host.cache import write_atomically

    try:
        write_atomically(path.absolute(), content)
    except OSError as exc:
        STDERR.print(f"error: {path} cannot be written: {exc.strerror}")
        return errors.VmprovisionError.exit_code
    return 0


def fail(exc: errors.VmprovisionError, *, as_json: bool) -> NoReturn:
    """Print an error with its next step, and end the program with its exit code."""
    show_error(exc, f"error: {exc.message}")
    if as_json:
        document = {"error": exc.as_json(), "exit_code": exc.exit_code}
        sys.stdout.write(json.dumps(document) + "\n")
    elif isinstance(exc, errors.UnsupportedGuestError):
        # nothing else is printed there, so a shell can redirect it into a file
        sys.stdout.write(exc.configuration)
    raise typer.Exit(exc.exit_code)


def show_error(exc: errors.VmprovisionError, *sentences: str) -> None:
    """Print the sentences of an error, its next step, and the console of a guest."""
    for sentence in sentences:
        STDERR.print(sentence)
    if exc.hint:
        STDERR.print(f"  next: {exc.hint}")
    if isinstance(exc, errors.ProofError):
        for line in exc.console:
            STDERR.print(f"  console: {line}")
