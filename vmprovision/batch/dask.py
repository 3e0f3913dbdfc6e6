"""A Dask cluster as the executor of a batch: many hosts that share the images' storage.

Only this module imports ``distributed``, which comes with ``vmprovision[fleet]``.  Dask
decides which worker processes an image, and retries if a worker is lost or its host
fails.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmprovision.doctor import examine_host
from vmprovision.errors import FleetError, PlanError
from vmprovision.runtime.archive import build_archive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Executor
    from types import ModuleType

ADDRESS = re.compile(r"(tcp|tls)://[^\s/]+:\d{1,5}$")
CONNECT_SECONDS = 10
WORKER_SECONDS = 30
RETRIES = 2  # after an appliance failed; Dask counts lost workers separately


@contextlib.contextmanager
def connect_scheduler(address: str) -> Iterator[Executor]:
    """Give an executor for ``inject_many`` that uses the workers of a Dask cluster.

    Every worker needs this version of vmprovision with its requirements, and the images
    under the same paths. A job whose worker is lost goes to another worker; a job whose
    appliance failed is retried.

    Args:
        address: where the scheduler listens: ``tcp://HOST:PORT``, or ``tls://`` with
            Dask's own configuration for it.

    Raises:
        PlanError: the address is invalid.
        FleetError: ``distributed`` is not installed, the scheduler does not answer, it
            has no workers, their versions differ from this host's, or their hosts
            lack what the work needs.
    """
    with _connect(address) as client:
        yield _executor(client)


class Fleet:
    """A Dask cluster for a program that outlives connections to it; threads share it.

    It has the requirements of ``connect_scheduler``.
    """

    def __init__(self, address: str) -> None:
        """Keep the scheduler's address; ``executor`` connects."""
        self._address = address
        self._client: Any = None
        self._examined: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def executor(self) -> Executor:
        """Return an executor for ``inject_many``, by a new connection if the last one is lost.

        Raises:
            PlanError: the address is invalid.
            FleetError: the cluster cannot be used now.
        """
        with self._lock:
            if self._client is None or self._client.status == "closed":
                self._client = _connect(self._address)
                self._examined = frozenset()
            with _answering(self._address):
                workers = frozenset(self._client.nthreads())
                if not workers:
                    raise _without_workers(self._address)
                if not workers <= self._examined:
                    _examine(self._client)
                    self._examined = workers
            return _executor(self._client)

    def lacks_workers(self) -> FleetError | None:
        """Return the error that work waits for a worker, because all of them are gone.

        A scheduler that does not answer is no such error: Dask ends the work itself.
        """
        with contextlib.suppress(OSError, TimeoutError):
            if self._client.status == "running" and not self._client.nthreads():
                return _without_workers(self._address)
        return None

    def close(self) -> None:
        """Close the connection; work that no worker has begun is cancelled."""
        with self._lock:
            if self._client is not None:
                self._client.close()


def _connect(address: str) -> Any:  # noqa: ANN401 -- an optional library's client
    """Return a client of a usable cluster.

    Raises:
        PlanError: the address is invalid.
        FleetError: the cluster cannot be used.
    """
    if not ADDRESS.match(address):
        raise PlanError(
            f"{address!r} is not the address of a scheduler", hint="give tcp://HOST:PORT"
        )
    distributed = _distributed()
    with contextlib.ExitStack() as stack, _answering(address):
        client = stack.enter_context(
            distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        )
        _await_worker(client, address)
        _examine(client)
        stack.pop_all()
        return client


@contextlib.contextmanager
def _answering(address: str) -> Iterator[None]:
    """Check that the scheduler answers what the block asks it.

    Raises:
        FleetError: it does not.
    """
    try:
        yield
    except (OSError, TimeoutError) as exc:
        raise FleetError(
            f"no Dask scheduler answers at {address}: {exc}",
            hint="start one with `dask scheduler`, and workers with `dask worker`",
        ) from exc


def _without_workers(address: str) -> FleetError:
    return FleetError(
        f"the scheduler at {address} has no workers",
        hint=f"start some on the hosts: dask worker {address}",
    )


def _examine(client: Any) -> None:  # noqa: ANN401 -- an optional library's client
    """Refuse a cluster whose workers would do other work than this host, or none."""
    _require_same_versions(client.get_versions(packages=["vmprovision"]))
    _require_usable(client.run(examine_worker, on_error="return"))


def _executor(client: Any) -> Executor:  # noqa: ANN401 -- an optional library's client
    made: Executor = client.get_executor(pure=False, retries=RETRIES)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What a worker reports about itself.

    Attributes:
        agent: the agent that it would inject.
        faults: what its host lacks for the work, one sentence each.
    """

    agent: str
    faults: tuple[str, ...] = ()


def examine_worker() -> Worker:
    """Return what this process would inject and whether it can; every worker runs this."""
    findings = examine_host()
    return Worker(
        agent=_agent(),
        faults=tuple(
            f"{each.subject}: {each.detail}" for each in findings if each.needed and not each.ok
        ),
    )


def _agent() -> str:
    archive = build_archive()
    return f"agent {archive.version} ({archive.sha256[:12]})"


def _distributed() -> ModuleType:
    try:
        return importlib.import_module("distributed")
    except ImportError as exc:
        raise FleetError(
            "Dask's distributed is not installed in this Python",
            hint="pip install 'vmprovision[fleet]'",
        ) from exc


def _await_worker(client: Any, address: str) -> None:  # noqa: ANN401 -- an optional library's
    try:
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
    except TimeoutError as exc:
        raise _without_workers(address) from exc


def _require_same_versions(versions: Any) -> None:  # noqa: ANN401 -- an optional library's
    """Refuse a cluster whose versions differ from this host's."""
    peers = {"the scheduler": versions["scheduler"], **versions["workers"]}
    for name, peer in peers.items():
        for package in ("vmprovision", "distributed"):
            here = versions["client"]["packages"].get(package)
            there = peer["packages"].get(package)
            if there != here:
                raise FleetError(
                    f"{name} has {package} {there or 'not installed'}, this host has {here}",
                    hint="install the same versions everywhere",
                )


def _require_usable(workers: dict[str, Worker | Exception]) -> None:
    """Refuse workers that would inject another agent, or fail every image."""
    here = _agent()
    for name, worker in workers.items():
        if isinstance(worker, Exception):
            raise FleetError(f"{name} could not report its state: {worker}")
        if worker.agent != here:
            raise FleetError(
                f"{name} would inject {worker.agent}, this host {here}",
                hint="install the same versions everywhere, and restart the workers",
            )
        if worker.faults:
            raise FleetError(
                f"{name} cannot do the work: {'; '.join(worker.faults)}",
                hint="`vmprovision doctor`, run there, names the command that fixes it",
            )
