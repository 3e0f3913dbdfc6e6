"""The store on Debian's PostgreSQL: the same rows, and servers that pass each other."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from tests.server.conftest import insert_template, serving
from tests.server.postgresql import postgresql
from vmprovision.server.app import make_app
from vmprovision.server.leases import claim_building_vm
from vmprovision.server.limits import Gate
from vmprovision.server.queries import list_vms, read_vm_row
from vmprovision.server.settings import database_url
from vmprovision.server.store import Store
from vmprovision.server.tables import metadata

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vmprovision.server.services import Services

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of a database on a server of its own."""
    with postgresql(tmp_path_factory.mktemp("postgresql")) as url:
        yield url


@pytest.fixture
def store(database: str, tmp_path: Path) -> Iterator[Store]:
    """Return a store without rows; overrides the one on SQLite."""
    opened = Store(database_url(database, tmp_path))
    with opened.write() as connection:
        for table in reversed(metadata.sorted_tables):
            if table.name != "installation":
                connection.execute(table.delete())
    insert_template(opened)
    yield opened
    opened.close()


def test_the_migrations_make_the_tables(store: Store) -> None:
    """PostgreSQL gets the same tables as SQLite."""
    with store.write() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []


def test_servers_that_start_at_once(database: str, tmp_path: Path) -> None:
    """One of them migrates, and both have one name for their domains."""
    url = database_url(database, tmp_path)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(Store, [url] * 4))
    assert len({each.installation for each in stores}) == 1
    for each in stores:
        each.close()


def test_requests_at_once(services: Services) -> None:
    """Twenty VMs by twenty requests; one VM by twenty requests with one key or one name."""
    app = Gate(make_app(services), services.settings)
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:

        def create(name: str, key: str | None = None) -> httpx.Response:
            headers = {"Idempotency-Key": key} if key else {}
            body = {"name": name, "template_id": "debian"}
            return client.post("/v1/vms", json=body, headers=headers)

        with ThreadPoolExecutor(20) as pool:
            many = list(pool.map(create, [f"vm-{number}" for number in range(20)]))
            same = list(pool.map(lambda _: create("same", "key"), range(20)))
            twins = list(pool.map(lambda _: create("twin"), range(20)))
    assert {answer.status_code for answer in many} == {202}
    assert len({answer.json()["id"] for answer in many}) == 20
    assert {answer.status_code for answer in same} == {202}
    assert len({answer.json()["id"] for answer in same}) == 1
    assert sorted(answer.status_code for answer in twins) == [202] + [409] * 19
    assert len(list_vms(services.store)) == 22


def test_what_postgresql_cannot_store(services: Services) -> None:
    """A NUL in a name, a path or an id is refused as on SQLite."""
    app = Gate(make_app(services), services.settings)
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        for body in (
            {"name": "a\0b", "template_id": "debian"},
            {"name": "a", "template_id": "deb\0ian"},
            {"name": "a", "rootfs_path": "/a\0b", "vcpu": 1, "mem_mib": 64},
        ):
            assert client.post("/v1/vms", json=body).status_code == 422
        for path in ("/v1/vms/%00", "/v1/templates/%00", "/v1/templates/a%00b"):
            assert client.get(path).status_code == 404


def test_servers_pass_each_other(services: Services, database: str, tmp_path: Path) -> None:
    """Two servers claim at once: each VM is claimed once, and neither waits for the other."""
    other = Store(database_url(database, tmp_path))
    app = Gate(make_app(services), services.settings)
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        for number in range(20):
            client.post("/v1/vms", json={"name": f"vm-{number}", "template_id": "debian"})
    claimed: list[str] = []

    def claim(store: Store, owner: str) -> None:
        while (vm := claim_building_vm(store, owner, 60)) is not None:
            claimed.append(vm.id)

    threads = [
        threading.Thread(target=claim, args=(store, f"{name}-{number}"))
        for number in range(4)
        for name, store in (("one", services.store), ("other", other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed)) == 20
    other.close()


def test_a_locked_row_is_passed_by(services: Services, store: Store) -> None:
    """While a request holds one row, a worker takes the next one at once."""
    app = Gate(make_app(services), services.settings)
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        ids = [
            client.post("/v1/vms", json={"name": name, "template_id": "debian"}).json()["id"]
            for name in ("first", "second")
        ]
    with store.write() as connection:
        assert read_vm_row(connection, ids[0], lock=True)
        begun = time.monotonic()
        found = claim_building_vm(store, "owner", 60)
        assert found is not None
        assert found.id == ids[1]
        assert time.monotonic() - begun < 20
