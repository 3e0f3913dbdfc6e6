"""Run the server: start its listeners and workers, and stop them."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import uvicorn

from vmprovision.appliance.pool import Pool
from vmprovision.batch.dask import Fleet
from vmprovision.errors import HypervisorError, PlanError, VmprovisionError
from vmprovision.host.cache import make_private
from vmprovision.progress import Control
from vmprovision.server.agents import AgentClient
from vmprovision.server.app import make_app
from vmprovision.server.files import FOLDER_MODE
from vmprovision.server.hypervisor import Hypervisor
from vmprovision.server.inspecting import inspect_image
from vmprovision.server.limits import Gate
from vmprovision.server.services import Services
from vmprovision.server.store import Store
from vmprovision.server.tools import Tools
from vmprovision.server.worker import Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.types import ASGIApp

    from vmprovision.server.settings import Address, ServerSettings

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
NETWORK_SECONDS = 3.0
GRACE_SECONDS = 3
FREE_BIND = 15  # IP_FREEBIND of ip(7): the address may appear later


def serve(
    settings: ServerSettings, *, control: Control, is_ready: Callable[[], None] = lambda: None
) -> None:
    """Serve until the caller cancels.

    Args:
        settings: the server's settings.
        control: its ``cancelled`` ends the server; VMs run on.
        is_ready: called when clients can connect.

    Raises:
        VmprovisionError: the server cannot start.
    """
    with contextlib.ExitStack() as stack:
        listening = _listen(settings.listen)
        stack.callback(listening.close)
        _make_state(settings)
        store = Store(settings.database)
        stack.callback(store.close)
        agents = AgentClient()
        stack.callback(agents.close)
        # with a cluster, this host only reads images when they are registered
        pool = stack.enter_context(Pool(size=1 if settings.scheduler else settings.builders))
        fleet = _connect_fleet(settings.scheduler, stack) if settings.scheduler else None
        tools = Tools(
            settings=settings,
            store=store,
            agents=agents,
            hosts={uri: Hypervisor(uri, store.installation) for uri in settings.hosts},
            pool=pool,
            fleet=fleet,
            control=Control(),
        )
        workers = Workers(tools)
        services = Services(
            settings=settings,
            store=store,
            agents=agents,
            wake=workers.wake,
            inspect=lambda path, image_format: inspect_image(path, image_format, pool=pool),
        )
        app = make_app(services)
        stack.enter_context(_serving(Gate(app, settings), [listening]))
        workers.start()
        stack.callback(workers.stop)
        reports = threading.Thread(
            target=_serve_reports, args=(tools, app, control.cancelled), daemon=True
        )
        if settings.manager_url is None:
            reports.start()
            stack.callback(reports.join)
        is_ready()
        while not control.cancelled.wait(POLL_SECONDS):
            pass


def _connect_fleet(address: str, stack: contextlib.ExitStack) -> Fleet:
    """Return a usable Dask cluster, closed with the stack.

    Raises:
        PlanError: the address is invalid.
        FleetError: the cluster cannot be used.
    """
    fleet = Fleet(address)
    stack.callback(fleet.close)
    fleet.executor()
    return fleet


def _make_state(settings: ServerSettings) -> None:
    """Make the state folder, with a mode that lets QEMU enter it."""
    try:
        make_private(settings.state)
        settings.state.chmod(FOLDER_MODE)
    except OSError as exc:
        raise VmprovisionError(
            f"the folder {settings.state} cannot be used: {exc.strerror}",
            hint="choose another one with --state",
        ) from exc


def _listen(address: Address, *, shared: bool = False) -> socket.socket:
    """Return a listening socket.

    Args:
        address: the address to listen on.
        shared: let other servers of this user listen there too, and accept an address that the
            host does not have yet.

    Raises:
        PlanError: the address is in use, or does not belong to this host.
    """
    try:
        if address.path is not None:
            return _listen_unix(address)
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            made.setsockopt(socket.IPPROTO_IP, FREE_BIND, 1)
        made.bind((address.host, address.port))
        made.listen(128)
    except OSError as exc:
        hint = "another program listens there; choose another port with --listen"
        raise PlanError(
            f"the server cannot listen on {address}: {exc.strerror}",
            hint=hint if exc.errno == errno.EADDRINUSE else "",
        ) from exc
    return made


def _listen_unix(address: Address) -> socket.socket:
    """Return a Unix socket for this user only; replace the socket of a dead server."""
    path = address.path
    assert path is not None  # noqa: S101 -- by the caller
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as trial:
        trial.connect(str(path))
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    if path.is_socket():
        path.unlink()
    made = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        made.bind(str(path))
    finally:
        os.umask(before)
    made.listen(128)
    return made


@contextlib.contextmanager
def _serving(app: ASGIApp, listening: list[socket.socket]) -> Iterator[None]:
    """Serve an application in a thread."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=32 << 10,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=(listening,))
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join()


def _serve_reports(tools: Tools, app: ASGIApp, ended: threading.Event) -> None:
    """Accept reports at the host's address in the guests' network, once that is known."""
    settings = tools.settings
    while not ended.is_set():
        try:
            host = next(iter(tools.hosts.values()))
            found = host.network(settings.network).address
            address = type(settings.listen)(host=found, port=settings.report_port)
            with (
                contextlib.closing(_listen(address, shared=True)) as listening,
                _serving(Gate(app, settings, only_reports=True), [listening]),
            ):
                log.info("agents report to %s", address)
                ended.wait()
        except HypervisorError as exc:
            log.debug("agents cannot report yet: %s", exc)
        except PlanError as exc:
            log.warning("agents cannot report: %s", exc)
        ended.wait(NETWORK_SECONDS)
