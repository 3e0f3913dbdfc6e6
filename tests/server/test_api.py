"""The API on the wire: envelopes, problems, idempotency and who may do what."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlalchemy import insert, select, update

from tests.server.conftest import TEMPLATE_ID, insert_template, serving
from vmprovision.errors import PlanError
from vmprovision.server.access import load_tokens
from vmprovision.server.app import make_app
from vmprovision.server.limits import BODY_BYTES, Buckets, Gate
from vmprovision.server.settings import ServerSettings, parse_address
from vmprovision.server.tables import events, samples, vms

if TYPE_CHECKING:
    from pathlib import Path

    from vmprovision.server.services import Services
    from vmprovision.server.store import Store

ADMIN, READER = "admin-token", "read-token"


def change(store: Store, vm_id: str, **values: object) -> None:
    """Change a VM's row as a worker would."""
    with store.write() as connection:
        connection.execute(update(vms).where(vms.c.id == vm_id).values(values))


def token_of(store: Store, vm_id: str) -> str:
    """Return the token that a VM's agent will have."""
    with store.read() as connection:
        return str(connection.scalar(select(vms.c.token).where(vms.c.id == vm_id)))


def problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """Check that an answer is a problem of this kind; return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["kind"] == kind
    assert document["status"] == status
    assert document["type"].endswith(kind)
    return document


def test_a_vm_is_created_at_once(client: httpx.Client) -> None:
    """The specification's request is answered with an id, and with all that is known."""
    body = {"name": "test-vm", "template_id": TEMPLATE_ID}
    answer = client.post("/v1/vms", json=body)
    assert answer.status_code == 202
    made = answer.json()
    assert made["id"] == made["item"]["id"]
    assert (made["item"]["state"], made["item"]["phase"]) == ("stopped", "requested")
    assert (made["item"]["vcpu"], made["item"]["mem_mib"]) == (1, 256)
    assert client.get(answer.headers["location"]).json()["item"] == made["item"]
    assert client.get("/v1/vms").json() == {"items": [made["item"]]}


def test_one_key_makes_one_vm(client: httpx.Client) -> None:
    """Twenty requests with one Idempotency-Key, at once, get one VM; another body is refused."""
    body = {"name": "test-vm", "template_id": "debian"}
    headers = {"Idempotency-Key": "key-1"}

    def create(_: int) -> httpx.Response:
        return client.post("/v1/vms", json=body, headers=headers)

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(create, range(20)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 19
    assert len(client.get("/v1/vms").json()["items"]) == 1
    other = client.post("/v1/vms", json={**body, "name": "other"}, headers=headers)
    problem(other, 422, "IdempotencyKeyReused")


def test_twenty_vms_at_once(client: httpx.Client) -> None:
    """None of them is lost, and no two have one id."""

    def create(number: int) -> httpx.Response:
        return client.post("/v1/vms", json={"name": f"vm-{number}", "template_id": "debian"})

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(create, range(20)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 20


def test_a_name_is_taken_once(client: httpx.Client, vm: dict[str, Any]) -> None:
    """Of requests with one name, at once or later, one gets a VM."""

    def create(_: int) -> int:
        return client.post("/v1/vms", json={"name": "twin", "template_id": "debian"}).status_code

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        assert sorted(pool.map(create, range(10))) == [202] + [409] * 9
    again = client.post("/v1/vms", json={"name": vm["name"], "template_id": "debian"})
    assert vm["id"] in problem(again, 409, "Conflict")["detail"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"name": "x"}, "template_id"),
        ({"name": "x", "template_id": "debian", "flavour": "big"}, "flavour"),
        ({"name": "x\n", "template_id": "debian"}, "name"),
        ({"name": "\u202ex", "template_id": "debian"}, "name"),
        ({"name": "", "template_id": "debian"}, "name"),
        ({"name": "x" * 129, "template_id": "debian"}, "name"),
        ({"name": "x", "template_id": "debian", "vcpu": 0}, "vcpu"),
        ({"name": "x", "template_id": "debian", "vcpu": "1"}, "vcpu"),
        ({"name": "x", "template_id": "debian", "mem_mib": 1 << 40}, "mem_mib"),
        ({"name": "x", "template_id": "debian", "tags": ["a\tb"]}, "tags"),
        ([], "body"),
    ],
)
def test_wrong_requests_are_refused(client: httpx.Client, body: object, pointer: str) -> None:
    """The problem names the place of the fault, and no row is written."""
    document = problem(client.post("/v1/vms", json=body), 422, "InvalidRequest")
    assert any(pointer in fault["pointer"] for fault in document["errors"])
    assert client.get("/v1/vms").json() == {"items": []}


def test_an_unknown_template_is_refused(client: httpx.Client) -> None:
    """The next step is in the problem."""
    answer = client.post("/v1/vms", json={"name": "x", "template_id": "none"})
    assert "/v1/templates" in problem(answer, 422, "InvalidRequest")["hint"]


def test_an_image_must_be_in_a_folder(
    client: httpx.Client, settings: ServerSettings, tmp_path: Path
) -> None:
    """Paths, and links that lead out, are refused alike, whether or not there is a file."""
    secret = tmp_path / "secret.qcow2"
    secret.write_bytes(b"secret")
    folder = settings.image_folders[0]
    (folder / "link.qcow2").symlink_to(secret)
    (folder / "circle").symlink_to("circle")
    paths = [secret, "/etc/passwd", "/nowhere", "relative", folder, f"{folder}/../secret.qcow2"]
    paths += [folder / "link.qcow2", folder / "circle", "/\0", "/" + "x" * 4000]
    for path in paths:
        for target, body in (
            ("/v1/templates", {"name": "x", "spec": {"rootfs_path": str(path)}}),
            ("/v1/vms", {"name": "x", "rootfs_path": str(path), "vcpu": 1, "mem_mib": 64}),
        ):
            document = problem(client.post(target, json=body), 422, "ImageNotFoundError")
            assert document["exit_code"] == 11
            assert "no such image below" in document["detail"]


def test_an_image_that_is_none_is_refused(client: httpx.Client, settings: ServerSettings) -> None:
    """The library's own error, with its exit code, and nothing is registered."""
    image = settings.image_folders[0] / "noise.qcow2"
    image.write_bytes(b"noise" * 1000)
    body = {"name": "x", "spec": {"rootfs_path": str(image)}}
    document = problem(client.post("/v1/templates", json=body), 422, "ImageFormatError")
    assert document["exit_code"] == 12
    assert str(image) in document["detail"]
    assert [item["name"] for item in client.get("/v1/templates").json()["items"]] == ["debian"]


def test_templates(client: httpx.Client, vm: dict[str, Any]) -> None:
    """A template is found by id and name, changes its size, and is kept while it is used."""
    item = client.get("/v1/templates/debian").json()["item"]
    assert item == client.get(f"/v1/templates/{TEMPLATE_ID}").json()["item"]
    assert item["vm_count"] == 1
    changed = client.patch("/v1/templates/debian", json={"spec": {"mem_mib": 512}})
    assert changed.json()["item"]["spec"]["mem_mib"] == 512
    assert client.get(f"/v1/vms/{vm['id']}").json()["item"]["mem_mib"] == 256
    problem(client.delete("/v1/templates/debian"), 409, "Conflict")
    problem(client.delete("/v1/templates/none"), 404, "NotFound")
    made = client.post("/v1/templates/debian/instantiate", json={"name": "second", "more": 1})
    assert made.json()["item"]["mem_mib"] == 512


def test_a_template_that_failed_makes_no_vm(client: httpx.Client, store: Store) -> None:
    """Its error is one request away."""
    insert_template(store, id="0" * 36, name="broken", state="failed", error={"detail": "full"})
    answer = client.post("/v1/vms", json={"name": "x", "template_id": "broken"})
    assert "0" * 36 in problem(answer, 409, "Conflict")["hint"]


def test_an_unused_template_is_marked_for_deletion(client: httpx.Client) -> None:
    """No VM can be made of it any more."""
    assert client.delete("/v1/templates/debian").status_code == 204
    assert client.get("/v1/templates/debian").json()["item"]["state"] == "deleting"
    answer = client.post("/v1/vms", json={"name": "x", "template_id": "debian"})
    problem(answer, 422, "InvalidRequest")


def test_unknown_vms(client: httpx.Client) -> None:
    """Every path below a VM that does not exist is a 404."""
    for vm_id in ("no-id", TEMPLATE_ID, "%00", "..%2f..%2fetc", "\ud7ff"):
        for path in ("", "/metrics", "/events"):
            assert client.get(f"/v1/vms/{vm_id}{path}").status_code == 404
        for word in ("start", "stop", "pause", "resume"):
            assert client.post(f"/v1/vms/{vm_id}/{word}").status_code == 404
        report = client.post(f"/v1/vms/{vm_id}/guest-ip", json={"guest_ip": "192.0.2.1"})
        assert report.status_code == 404


def test_what_is_wanted(client: httpx.Client, store: Store, vm: dict[str, Any]) -> None:
    """Requests say what is wanted; the state stays what was seen."""
    path = f"/v1/vms/{vm['id']}"
    problem(client.post(f"{path}/pause"), 409, "Conflict")
    change(store, vm["id"], phase="ready", domain_state="running")
    assert client.get(path).json()["item"]["state"] == "running"
    paused = client.post(f"{path}/pause").json()["item"]
    assert (paused["wanted"], paused["state"]) == ("paused", "running")
    assert client.post(f"{path}/resume").json()["item"]["wanted"] == "running"
    problem(client.post(f"{path}/resume"), 409, "Conflict")
    assert client.post(f"{path}/stop").json()["item"]["state"] == "stopping"
    assert client.delete(path).json()["item"]["state"] == "stopping"
    assert client.delete(path).status_code == 202
    problem(client.post(f"{path}/start"), 409, "Conflict")


def test_a_failed_vm_is_tried_again(client: httpx.Client, store: Store, vm: dict[str, Any]) -> None:
    """Starting it forgets the error."""
    change(store, vm["id"], has_failed=True, phase="disk", error={"detail": "full"})
    assert client.get(f"/v1/vms/{vm['id']}").json()["item"]["state"] == "failed"
    item = client.post(f"/v1/vms/{vm['id']}/start").json()["item"]
    assert (item["state"], item["phase"], item["error"]) == ("stopped", "disk", None)


def test_names_and_tags_change(client: httpx.Client, vm: dict[str, Any]) -> None:
    """The id stays."""
    client.post("/v1/vms", json={"name": "other", "template_id": "debian"})
    path = f"/v1/vms/{vm['id']}"
    item = client.patch(path, json={"name": "web", "tags": ["a"]}).json()["item"]
    assert (item["name"], item["tags"]) == ("web", ["a"])
    problem(client.patch(path, json={"name": "other"}), 409, "Conflict")


def test_a_report_needs_the_token_of_the_vm(
    client: httpx.Client, store: Store, vm: dict[str, Any]
) -> None:
    """401 without it or with another VM's, 422 for what is not an address of a guest."""
    other = client.post("/v1/vms", json={"name": "other", "template_id": "debian"}).json()["id"]
    path, body = f"/v1/vms/{vm['id']}/guest-ip", {"guest_ip": "192.0.2.7"}
    for headers in ({}, {"Authorization": "Bearer x"}, bearer(token_of(store, other))):
        problem(client.post(path, json=body, headers=headers), 401, "Unauthorized")
    own = bearer(token_of(store, vm["id"]))
    for wrong in (
        "",
        "x",
        "999.1.1.1",
        "127.0.0.1",
        "::1",
        "0",
        "0.0.0.0",  # noqa: S104 -- refused
        "224.0.0.1",
        "169.254.1.1",
    ):
        problem(client.post(path, json={"guest_ip": wrong}, headers=own), 422, "InvalidRequest")
    for other_wrong in ("::ffff:127.0.0.1", "fe80::1%eth0", "http://192.0.2.1", 5, None):
        problem(
            client.post(path, json={"guest_ip": other_wrong}, headers=own), 422, "InvalidRequest"
        )
    assert client.get(f"/v1/vms/{vm['id']}").json()["item"]["guest_ip"] is None
    assert client.post(path, json={**body, "more": 1}, headers=own).status_code == 200
    item = client.get(f"/v1/vms/{vm['id']}").json()["item"]
    assert item["guest_ip"] == "192.0.2.7"
    assert item["phase"] == "requested"  # a report alone makes nothing ready


def bearer(token: str) -> dict[str, str]:
    """Return the field that shows a token."""
    return {"Authorization": f"Bearer {token}"}


def test_waiting_for_the_agent(client: httpx.Client, store: Store, vm: dict[str, Any]) -> None:
    """It ends with the time, with the agent, or with the end of all hope."""
    path = f"/v1/vms/{vm['id']}?wait=agent"
    assert client.get(f"{path}&timeout=0.1").json()["item"]["phase"] == "requested"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.get, f"{path}&timeout=30")
        change(store, vm["id"], phase="silent")
        assert waiting.result().json()["item"]["phase"] == "silent"
    change(store, vm["id"], phase="disk", has_failed=True)
    assert client.get(f"{path}&timeout=30").json()["item"]["state"] == "failed"
    assert client.get(f"{path}&timeout=-1").status_code == 422
    assert client.get(f"{path}&timeout=nan").status_code == 422


def test_events_are_streamed(client: httpx.Client, store: Store, vm: dict[str, Any]) -> None:
    """From the beginning or after a given one, until the VM is gone."""
    with store.write() as connection:
        row = {"vm_id": vm["id"], "at": 1.0, "kind": "deleted", "message": "a\nb"}
        connection.execute(insert(events).values(row))
    path = f"/v1/vms/{vm['id']}/events"
    first = client.get(path)
    assert first.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in first.text.splitlines() if line.startswith(("event:", "data:"))]
    assert [line for line in lines if line.startswith("event:")] == [
        "event: requested",
        "event: deleted",
    ]
    assert json.loads(lines[-1].removeprefix("data:"))["message"] == "a\nb"
    later = client.get(path, headers={"Last-Event-ID": "1"})
    assert "requested" not in later.text


def test_samples(client: httpx.Client, store: Store, vm: dict[str, Any]) -> None:
    """The newest between two times, in NQRust-MicroVM's form."""
    with store.write() as connection:
        for number in range(5):
            row = {"vm_id": vm["id"], "at": 1_000_000.0 + number, "cpu_usage_percent": number}
            connection.execute(insert(samples).values(row))
    path = f"/v1/metrics/vms/{vm['id']}"
    found = client.get(path, params={"limit": 2}).json()
    assert [sample["cpu_usage_percent"] for sample in found] == [3, 4]
    assert found[0]["recorded_at"] == "1970-01-12T13:46:43Z"
    between = {"from": "1970-01-12T13:46:41Z", "to": "1970-01-12T13:46:42Z"}
    assert len(client.get(path, params=between).json()) == 2
    assert client.get(path, params={"limit": 0}).status_code == 422
    problem(client.get(f"/v1/vms/{vm['id']}/metrics"), 409, "Conflict")


def test_discovery_lists_agents(client: httpx.Client, store: Store, vm: dict[str, Any]) -> None:
    """A VM is a target as soon as its address is known."""
    assert client.get("/v1/sd").json() == []
    change(store, vm["id"], guest_ip="2001:db8::7", host="qemu:///system")
    (group,) = client.get("/v1/sd").json()
    assert group["targets"] == ["[2001:db8::7]:8080"]
    assert group["labels"]["__meta_vmprovision_name"] == "test-vm"
    assert 'vmprovision_vms{phase="requested"} 1.0' in client.get("/metrics").text


def test_the_api_is_described(client: httpx.Client) -> None:
    """Without anything from elsewhere: every operation is on one page."""
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    document = client.get("/openapi.json").json()
    assert "/v1/vms/{vm_id}/guest-ip" in document["paths"]
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"<code>{method.upper()} {path}</code>" in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_a_database_without_room(client: httpx.Client, store: Store) -> None:
    """A request that cannot be written down is refused, with the next step; others are served."""
    with store.read() as connection:  # the one that the requests get as well
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
    bodies = [{"name": f"vm-{number}", "template_id": "debian"} for number in range(40)]
    answers = [client.post("/v1/vms", json=body) for body in bodies]
    document = problem(answers[-1], 507, "ImageSpaceError")
    assert "make room" in document["hint"]
    made = [answer for answer in answers if answer.status_code == 202]
    assert len(client.get("/v1/vms").json()["items"]) == len(made)


# Access


def test_strangers_need_a_token(settings: ServerSettings) -> None:
    """Listening on other addresses than loopback is refused without a token file."""
    for text in ("0.0.0.0:8080", "[::]:8080", "192.0.2.1:80"):
        with pytest.raises(PlanError, match="no token is required") as caught:
            ServerSettings(
                listen=parse_address(text), state=settings.state, database=settings.database
            )
        assert "--token-file" in caught.value.hint


def test_guests_of_other_hosts_need_an_address(settings: ServerSettings) -> None:
    """A server for other hosts than its own is refused without an address for reports."""
    own, other = "qemu:///system", "qemu+ssh://other/system"
    for hosts in ((other,), (own, other)):
        with pytest.raises(PlanError, match="ssh://other") as caught:
            dataclasses.replace(settings, hosts=hosts)
        assert "--manager-url" in caught.value.hint
        url = "http://192.0.2.1:8080"
        assert dataclasses.replace(settings, hosts=hosts, manager_url=url).hosts == hosts


@pytest.mark.parametrize(
    "text", ["", "x:80", "127.0.0.1:x", "127.0.0.1:99999", "unix:x", "1@[::1]"]
)
def test_wrong_addresses(text: str) -> None:
    """They are refused before anything is opened."""
    with pytest.raises(PlanError, match="cannot listen"):
        parse_address(text)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """Return a token file."""
    path = tmp_path / "tokens"
    path.write_text(f"# ours\nadmin {ADMIN}\nread {READER} # for Prometheus\n")
    path.chmod(0o600)
    return path


def test_tokens(services: Services, token_file: Path, store: Store) -> None:
    """Readers read, admins change, agents report, and everybody else is sent away."""
    guarded = ServerSettings(
        listen=parse_address("0.0.0.0:0"),
        state=services.settings.state,
        database=services.settings.database,
        tokens=load_tokens(token_file),
    )
    body = {"name": "test-vm", "template_id": "debian"}
    with serving(Gate(make_app(services), guarded)) as url, httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, bearer("wrong"), {"Authorization": "Basic eDpyZWFkLXRva2Vu"}):
            answer = client.get("/v1/vms", headers=headers)
            problem(answer, 401, "Unauthorized")
            assert answer.headers["www-authenticate"].startswith("Bearer")
        twice = [("Authorization", f"Bearer {ADMIN}"), ("Authorization", f"Bearer {ADMIN}")]
        problem(client.get("/v1/vms", headers=twice), 401, "Unauthorized")
        assert client.get("/v1/vms", headers=bearer(READER)).status_code == 200
        problem(client.post("/v1/vms", json=body, headers=bearer(READER)), 403, "Forbidden")
        made = client.post("/v1/vms", json=body, headers=bearer(ADMIN))
        assert made.status_code == 202
        report = f"/v1/vms/{made.json()['id']}/guest-ip"
        own = bearer(token_of(store, made.json()["id"]))
        assert client.post(report, json={"guest_ip": "192.0.2.1"}, headers=own).status_code == 200
        refused = client.post(report, json={"guest_ip": "192.0.2.1"}, headers=bearer(ADMIN))
        problem(refused, 401, "Unauthorized")


@pytest.mark.parametrize(
    "content", ["", "read abc", "admin a b", "root x", "admin \u00e9", "admin ="]
)
def test_wrong_token_files(tmp_path: Path, content: str) -> None:
    """A file that would lock everybody out, or let anybody in, is refused."""
    path = tmp_path / "tokens"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(PlanError):
        load_tokens(path)


def test_a_token_file_is_private(token_file: Path) -> None:
    """One that others can read is refused, with the command that mends it."""
    token_file.chmod(0o644)
    with pytest.raises(PlanError) as caught:
        load_tokens(token_file)
    assert caught.value.hint.startswith("chmod 0600")


def test_open_reports(services: Services, vm: dict[str, Any]) -> None:
    """With --open-reports an agent without a token may report; a wrong token is still wrong."""
    opened = dataclasses.replace(services.settings, open_reports=True)
    app = make_app(dataclasses.replace(services, settings=opened))
    path, body = f"/v1/vms/{vm['id']}/guest-ip", {"guest_ip": "192.0.2.1"}
    with serving(Gate(app, opened)) as url, httpx.Client(base_url=url) as client:
        problem(client.post(path, json=body, headers=bearer("x")), 401, "Unauthorized")
        assert client.post(path, json=body).status_code == 200


def test_other_sites_cannot_ask(client: httpx.Client) -> None:
    """A page in the user's browser neither changes anything nor leads a name here."""
    body = {"name": "x", "template_id": "debian"}
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        answer = client.post("/v1/vms", json=body, headers=headers)
        problem(answer, 403, "CrossSiteRequest")
    for host in ("evil.example", "evil.example:8080", "localhost.evil.example"):
        problem(client.get("/v1/vms", headers={"Host": host}), 421, "MisdirectedRequest")
    for host in ("localhost", "localhost:8080", "[::1]:8080", "127.0.0.1"):
        assert client.get("/v1/vms", headers={"Host": host}).status_code == 200
    own = str(client.base_url).rstrip("/")
    same = {"Origin": own, "Sec-Fetch-Site": "same-origin"}
    assert client.post("/v1/vms", json=body, headers=same).status_code == 202


def test_large_requests_are_refused(client: httpx.Client) -> None:
    """With and without a stated length."""
    large = b" " * (BODY_BYTES + 1)
    problem(client.post("/v1/vms", content=large), 413, "RequestTooLarge")
    problem(client.post("/v1/vms", content=iter([large])), 413, "RequestTooLarge")


def test_only_reports_where_guests_are(services: Services, vm: dict[str, Any]) -> None:
    """At the address that guests know, nothing but their reports is served."""
    gate = Gate(make_app(services), services.settings, only_reports=True)
    with serving(gate) as url, httpx.Client(base_url=url, trust_env=False) as guest:
        for path in ("/v1/vms", "/", "/docs", "/openapi.json", "/metrics", f"/v1/vms/{vm['id']}"):
            problem(guest.get(path), 404, "NotFound")
        problem(guest.delete(f"/v1/vms/{vm['id']}"), 404, "NotFound")
        assert guest.get("/health").status_code == 200
        report = guest.post(f"/v1/vms/{vm['id']}/guest-ip", json={"guest_ip": "192.0.2.1"})
        problem(report, 401, "Unauthorized")


def test_too_many_requests() -> None:
    """A client that empties its bucket waits; another one does not."""
    buckets = Buckets(rate=2.0, burst=3.0)
    assert [buckets.take("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert buckets.take("b", 0.0)
    assert buckets.take("a", 0.5)
    assert not buckets.take("a", 0.5)
