"""Fixtures of the server's tests: a store, and a server that really listens."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
from sqlalchemy import insert

from tests.server.libvirt_host import LibvirtHost, let_others_enter, libvirt_host
from vmprovision.progress import Control
from vmprovision.recipe import build_image
from vmprovision.server.agents import AgentClient
from vmprovision.server.app import make_app
from vmprovision.server.inspecting import inspect_image
from vmprovision.server.limits import Gate
from vmprovision.server.services import Services
from vmprovision.server.settings import ServerSettings, database_url
from vmprovision.server.store import Store
from vmprovision.server.tables import templates

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from starlette.types import ASGIApp

TEMPLATE_ID = "8e837eb4-67b7-4056-ba4e-8ff59488861b"
START_SECONDS = 30.0


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve an application on a free port of loopback; give its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        end = time.monotonic() + START_SECONDS
        while not server.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    """Return settings with everything below the test's folder."""
    images = tmp_path / "images"
    images.mkdir()
    return ServerSettings(
        state=tmp_path / "state",
        database=database_url(None, tmp_path / "state"),
        image_folders=(images,),
    )


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the file of a store without rows: the migrations take longer than most tests."""
    path = tmp_path_factory.mktemp("database") / "server.db"
    Store(f"sqlite:///{path}").close()
    return path.read_bytes()


@pytest.fixture
def store(settings: ServerSettings, empty_database: bytes) -> Iterator[Store]:
    """Return a store on SQLite with one template, which is ready."""
    settings.state.mkdir()
    (settings.state / "server.db").write_bytes(empty_database)
    opened = Store(settings.database)
    insert_template(opened)
    yield opened
    opened.close()


def insert_template(store: Store, **values: object) -> str:
    """Write the row of a template that is ready; return its id."""
    row = {
        "id": TEMPLATE_ID,
        "name": "debian",
        "vcpu": 1,
        "mem_mib": 256,
        "rootfs_path": "/images/debian.qcow2",
        "agent": "required",
        "state": "ready",
        "guest": {"product_name": "Debian", "arch": "x86_64"},
        "boot": {},
        "has_agent": True,
        "due_at": 0.0,
        "created_at": 0.0,
        "updated_at": 0.0,
        **values,
    }
    with store.write() as connection:
        connection.execute(insert(templates).values(row))
    return str(row["id"])


@pytest.fixture
def services(settings: ServerSettings, store: Store) -> Iterator[Services]:
    """Return the services of a server that has no workers."""
    agents = AgentClient()
    yield Services(
        settings=settings,
        store=store,
        agents=agents,
        wake=lambda: None,
        inspect=lambda path, image_format: inspect_image(path, image_format, pool=None),
    )
    agents.close()


@pytest.fixture
def client(services: Services) -> Iterator[httpx.Client]:
    """Return a client of a server without workers: whatever is created stays requested."""
    with (
        serving(Gate(make_app(services), services.settings)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=30) as made,
    ):
        yield made


@pytest.fixture
def vm(client: httpx.Client) -> dict[str, Any]:
    """Return a VM that was just created."""
    answer = client.post("/v1/vms", json={"name": "test-vm", "template_id": "debian"})
    assert answer.status_code == 202, answer.text
    item: dict[str, Any] = answer.json()["item"]
    return item


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LibvirtHost]:
    """Return a private libvirt."""
    let_others_enter(tmp_path)  # QEMU has a user of its own
    with libvirt_host(tmp_path / "host") as started:
        yield started


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder with an image of the smallest guest."""
    folder = tmp_path / "images"
    folder.mkdir()
    build_image("busybox-standalone", output=folder / "busybox.qcow2", control=Control())
    return folder
