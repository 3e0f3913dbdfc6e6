"""The pages as HTML: what they show, what their forms do, and who may use them."""

from __future__ import annotations

import dataclasses
import html
import re
import unicodedata
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.server.conftest import TEMPLATE_ID, serving
from tests.server.libvirt_host import wait_until
from tests.server.shown import insert_machines, insert_samples, insert_vm
from vmprovision.server.access import Tokens, hash_token
from vmprovision.server.app import make_app
from vmprovision.server.limits import LOGIN_BURST, Gate
from vmprovision.server.pages.charts import Axes, draw, round_top
from vmprovision.server.queries import list_vms
from vmprovision.server.sessions import SECONDS, make_session, role_of_session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmprovision.server.services import Services
    from vmprovision.server.store import Store

ADMIN, READER = "an-admin-token", "a-read-token"
TOKENS = Tokens(admin=frozenset({hash_token(ADMIN)}), read=frozenset({hash_token(READER)}))
VOID = {"meta", "link", "input", "br", "path", "circle", "rect"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;",
    "javascript:alert(1)",
    "x" * 128,
    "\u05e9\u05dc\u05d5\u05dd",
)


class Outline(HTMLParser):
    """Reads a page: its elements, which must be closed in their order, and its text."""

    def __init__(self, page: str) -> None:
        """Read all of it."""
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep an element."""
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep an element that has nothing in it."""
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        """Check that the element that is closed is the last one that was opened."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Keep text."""
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """Return the attributes of every element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]


def read(client: httpx.Client, path: str, status: int = 200) -> Outline:
    """Return a page, after what holds for every page was checked."""
    answer = client.get(path)
    assert answer.status_code == status, answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not any(unicodedata.category(c) in ("Cc", "Cf") and c != "\n" for c in answer.text)
    page = Outline(answer.text)
    check_page(page)
    return page


def check_page(page: Outline) -> None:
    """Check a page's frame: one heading, labelled fields, nothing inline and nothing foreign."""
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == 1
    assert tags.count("main") == 1
    assert page.all("html")[0]["lang"] == "en"
    labels = {label["for"] for label in page.all("label")}
    fields = [f for f in page.all("input") if f.get("type") != "hidden"] + page.all("select")
    assert {field["id"] for field in fields} == labels
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "style"
        for name in ("src", "href", "action", "hx-get"):
            assert not re.match(r"[a-z]+:|//", attributes.get(name, "/")), attributes
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or svg["aria-label"]


def form_of(client: httpx.Client, path: str) -> dict[str, str]:
    """Return the hidden fields of a page's forms."""
    found = Outline(client.get(path).text).all("input")
    return {field["name"]: field["value"] for field in found if field.get("type") == "hidden"}


def test_every_page(client: httpx.Client, services: Services) -> None:
    """A VM in each state, in the list and by itself, with all that is known of it."""
    ids = insert_machines(services)
    page = read(client, "/")
    assert "6 virtual machines: 1 injected, 1 paused, 2 ready, 1 silent, 1 stopped." in page.text
    for name in ids:
        assert name in page.text
    assert any(
        "CPU in the last ten minutes" in svg.get("aria-label", "") for svg in page.all("svg")
    )
    for vm_id in ids.values():
        read(client, f"/vms/{vm_id}")
        read(client, f"/vms/{vm_id}/delete")
    one = read(client, f"/vms/{ids['web-1']}")
    for seen in ("+45.5 s", "/health answers at", "219 MiB", "Started guest-agent.service"):
        assert seen in one.text
    assert "\\x1b" not in one.text  # colours of the console are left out
    silent = read(client, f"/vms/{ids['broken']}")
    assert "its kernel panicked" in silent.text
    assert "Next step:" in silent.text
    assert "Try again" in silent.text
    for path in ("/vms/new", "/templates", "/templates/new", f"/templates/{TEMPLATE_ID}/delete"):
        read(client, path)
    assert "the agent runs in Linux guests" in read(client, "/templates").text


def test_empty_pages_say_what_is_next(client: httpx.Client, store: Store) -> None:
    """Without VMs the command that makes one; without templates the one that builds an image."""
    assert '"template_id": "debian"' in read(client, "/").text
    client.delete("/v1/templates/debian")
    with store.write() as connection:
        connection.exec_driver_sql("DELETE FROM templates")
    for path in ("/", "/templates"):
        page = read(client, path)
        assert "vmprovision image build" in page.text
        assert "/templates/new" in {link["href"] for link in page.all("a")}


def test_hostile_names_stay_text(client: httpx.Client, services: Services) -> None:
    """A name is shown as it is on every page, and makes no element of its own."""
    plain = insert_vm(services.store, "plain-name")
    before = [tag for tag, _ in read(client, f"/vms/{plain}").elements]
    for name in HOSTILE:
        made = client.post("/v1/vms", json={"name": name, "template_id": "debian"}).json()["id"]
        insert_samples(services.store, made, level=1, seconds=60)
        assert name in read(client, f"/vms/{made}").text
        assert name in read(client, f"/vms/{made}/delete").text
        hostile = insert_vm(services.store, f"{name[:120]}-2")
        assert [tag for tag, _ in read(client, f"/vms/{hostile}").elements] == before
    page = read(client, "/")
    for name in HOSTILE:
        assert name in page.text


def test_control_characters_are_written_out(client: httpx.Client, services: Services) -> None:
    """Text of a guest or an error is escaped on every terminal and page."""
    error = {"detail": "a\x1b[2Jb\u202ec\0", "hint": "\x07", "kind": "X", "exit_code": 1}
    made = insert_vm(services.store, "a", "silent", error=error, tags=["\x9b1m"])
    folder = services.settings.state / "vms" / made
    folder.mkdir(parents=True)
    (folder / "console.log").write_bytes(b"\x1b]0;title\x07</pre><b>\xff\0\n")
    page = read(client, f"/vms/{made}")
    assert "a\\x1b[2Jb\\u202ec\\x00" in page.text
    assert "</pre><b>" in page.text
    assert page.all("b") == []
    read(client, "/")


def test_a_part_comes_only_when_it_changed(client: httpx.Client, services: Services) -> None:
    """A browser that has a part's newest state gets nothing, and else this part alone."""
    page = read(client, "/")
    urls = {e["id"]: e["hx-get"] for _, e in page.elements if "hx-get" in e}
    assert list(urls) == ["part-summary", "part-vms"]
    for url in urls.values():
        assert client.get(f"/{url}").status_code == 204
    insert_vm(services.store, "another")
    answer = client.get(f"/{urls['part-vms']}")
    assert answer.status_code == 200
    assert answer.text.startswith('<div id="part-vms" hx-get=')
    assert "another" in answer.text
    stopped = read(client, "/?live=no")
    assert not any("hx-get" in attributes for _, attributes in stopped.elements)
    assert stopped.all("script") == []


def test_a_part_alone_is_that_of_the_page(client: httpx.Client, services: Services) -> None:
    """A browser that has a whole page has the newest state of each of its parts."""
    vm_id = insert_vm(services.store, "web")
    insert_samples(services.store, vm_id, level=20)
    for path, count in (("/", 2), (f"/vms/{vm_id}", 7), ("/templates", 1)):

        def statuses(path: str = path) -> list[int]:
            urls = [e["hx-get"] for _, e in read(client, path).elements if "hx-get" in e]
            return [client.get(f"{path}{url}").status_code for url in urls]

        # charts move on every ten seconds
        wait_until("the same state", lambda: statuses() == [204] * count, 30)  # noqa: B023 -- at once


def test_the_page_of_a_vm_that_is_gone(client: httpx.Client) -> None:
    """It says so; one that is open leads to the others."""
    path = "/vms/8e837eb4-67b7-4056-ba4e-8ff594888610"
    assert "there is no VM" in read(client, path, 404).text
    answer = client.get(f"{path}?part=state", headers={"HX-Request": "true"})
    assert answer.headers["hx-redirect"] == "/"
    for wrong in ("/vms/%3Cscript%3E", "/templates/%1b/delete", "/static/..%2f__init__.py"):
        assert client.get(wrong).status_code == 404


def test_creating_and_deleting(client: httpx.Client, store: Store) -> None:
    """By forms alone; a form that is sent twice makes one VM."""
    form = {**form_of(client, "/vms/new"), "name": "web", "template_id": TEMPLATE_ID}
    form |= {"vcpu": "", "mem_mib": "300", "tags": " a, b ,"}
    answers = [client.post("/vms", data=form) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [303, 303]
    assert answers[0].headers["location"] == answers[1].headers["location"]
    (vm,) = list_vms(store)
    assert (vm.name, vm.vcpu, vm.mem_mib, vm.tags) == ("web", 1, 300, ["a", "b"])
    path = f"/vms/{vm.id}"
    assert answers[0].headers["location"] == path
    token = {"form_token": form["form_token"]}
    assert client.post(f"{path}/stop", data=token).headers["location"] == path
    assert list_vms(store)[0].wanted == "stopped"
    assert client.post(f"{path}/explode", data=token).status_code == 422
    assert client.get(f"{path}/delete").status_code == 200
    assert list_vms(store)[0].wanted == "stopped"  # asking deletes nothing
    assert client.post(f"{path}/delete", data=token).headers["location"] == "/"
    assert list_vms(store)[0].wanted == "deleted"


def test_wrong_forms_come_back(client: httpx.Client, store: Store) -> None:
    """With what was written, and with what is wrong beside its field."""
    insert_vm(store, "taken")
    hidden = form_of(client, "/vms/new")
    form = {**hidden, "name": "<i>", "template_id": TEMPLATE_ID, "vcpu": "many", "mem_mib": "1"}
    answer = client.post("/vms", data=form)
    assert answer.status_code == 422
    page = Outline(answer.text)
    check_page(page)
    fields = {field.get("id"): field for field in page.all("input")}
    assert fields["name"]["value"] == "<i>"
    assert fields["vcpu"]["aria-invalid"] == "true"
    assert "vcpu-fault" in fields["vcpu"]["aria-describedby"]
    assert "mem_mib-fault" in {e.get("id") for _, e in page.elements}
    taken = client.post("/vms", data={**form, "name": "taken", "vcpu": "", "mem_mib": ""})
    assert taken.status_code == 422
    assert "belongs to VM" in html.unescape(taken.text)
    form = {**form_of(client, "/templates/new"), "name": "x", "rootfs_path": "/etc/passwd"}
    refused = client.post("/templates", data=form)
    assert refused.status_code == 422
    assert "no such image below" in html.unescape(refused.text)
    assert len(list_vms(store)) == 1


def test_forms_of_others_are_refused(client: httpx.Client, store: Store) -> None:
    """A form needs this server's own token, and must come from its own page."""
    form = {**form_of(client, "/vms/new"), "name": "web", "template_id": TEMPLATE_ID}
    for wrong in ({**form, "form_token": "0" * 64}, {**form, "form_token": ""}):
        answer = client.post("/vms", data=wrong)
        assert (answer.status_code, "this form does not belong" in answer.text) == (403, True)
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.post("/vms", data=form, headers=headers).status_code == 403
    for content in (b"\xff", b"&".join(b"a=%d" % n for n in range(100)), b"{}"):
        for kind in ("application/x-www-form-urlencoded", "text/plain"):
            answer = client.post("/vms", content=content, headers={"Content-Type": kind})
            assert answer.status_code in (403, 422)
    assert list_vms(store) == []


@pytest.fixture
def guarded(services: Services) -> Iterator[httpx.Client]:
    """Return a client of a server with tokens."""
    settings = dataclasses.replace(services.settings, tokens=TOKENS)
    changed = dataclasses.replace(services, settings=settings)
    with (
        serving(Gate(make_app(changed), settings)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=30) as made,
    ):
        yield made


def log_in(client: httpx.Client, token: str, following: str = "/") -> httpx.Response:
    """Send the form that begins a session."""
    form = form_of(client, "/login")
    return client.post("/login", data={**form, "next": following, "token": token})


def test_logging_in_and_out(guarded: httpx.Client, store: Store) -> None:
    """Strangers are sent to a form; its cookie lets them in, and has no token in it."""
    sent = guarded.get("/vms/new")
    assert (sent.status_code, sent.headers["location"]) == (303, "/login?next=/vms/new")
    part = guarded.get("/?part=vms", headers={"HX-Request": "true"})
    assert (part.status_code, part.headers["hx-redirect"]) == (401, "/login?next=/")
    read(guarded, "/login")
    wrong = log_in(guarded, "wrong-token")
    assert wrong.status_code == 403
    assert "set-cookie" not in wrong.headers
    assert "wrong-token" not in wrong.text
    answer = log_in(guarded, ADMIN, "/templates")
    assert (answer.status_code, answer.headers["location"]) == (303, "/templates")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert ADMIN not in cookie
    assert hash_token(ADMIN) not in cookie
    page = read(guarded, "/")
    assert "Log out" in page.text
    form = {**form_of(guarded, "/vms/new"), "name": "web", "template_id": TEMPLATE_ID}
    assert guarded.post("/vms", data=form).status_code == 303
    assert len(list_vms(store)) == 1
    # the API takes a session to read only
    assert guarded.get("/v1/vms").status_code == 200
    body = {"name": "x", "template_id": "debian"}
    assert guarded.post("/v1/vms", json=body).status_code == 401
    out = guarded.post("/logout", data={"form_token": form["form_token"]})
    assert out.headers["location"] == "/login"
    assert guarded.get("/").status_code == 303


def test_a_reader_sees_and_does_not_act(guarded: httpx.Client, store: Store) -> None:
    """A read token shows every page without its forms, and changes nothing."""
    made = insert_vm(store, "web")
    log_in(guarded, READER)
    for path in ("/", f"/vms/{made}", "/templates", f"/vms/{made}/delete", "/vms/new"):
        page = read(guarded, path)
        assert {form["action"] for form in page.all("form")} == {"/logout"}
    token = form_of(guarded, "/")
    assert guarded.post(f"/vms/{made}/delete", data=token).status_code == 403
    assert list_vms(store)[0].wanted == "running"


def test_logins_lead_to_own_pages_only(guarded: httpx.Client) -> None:
    """A link with another site's address in it leads to the first page."""
    for wanted in ("//evil.example", "https://evil.example", "/\\evil.example", "evil", ""):
        assert log_in(guarded, READER, wanted).headers["location"] == "/"
    assert guarded.get("/login", params={"next": "/a\r\nX: y"}).status_code == 200


def test_tokens_cannot_be_guessed_fast(guarded: httpx.Client) -> None:
    """A client that tries one token after the other has to wait."""
    form = form_of(guarded, "/login")
    tried = [
        guarded.post("/login", data={**form, "token": f"guess-{number}"}).status_code
        for number in range(int(LOGIN_BURST) + 5)
    ]
    assert tried[0] == 403
    assert tried[-1] == 429


def test_sessions() -> None:
    """One says who made it, until its time is over, or its token is taken out of the file."""
    session = make_session(TOKENS, READER, 1000.0)
    assert session is not None
    assert role_of_session(TOKENS, session, 1000.0) == "read"
    assert role_of_session(TOKENS, session, 1001.0 + SECONDS) is None
    later = re.sub(r"^\d+", "9999999999", session)
    for forged in (later, session[:-1], f"{session[:-1]}g", "", "a.b.c", session.upper(), "\u0661"):
        assert role_of_session(TOKENS, forged, 1000.0) is None
    without = Tokens(admin=TOKENS.admin, read=frozenset())
    assert role_of_session(without, session, 1000.0) is None
    assert make_session(TOKENS, "another", 1000.0) is None


def test_lines() -> None:
    """A line breaks where samples are missing, stays inside its axes, and says its numbers."""
    axes = Axes(begin=0.0, end=600.0, top=100.0, width=60.0, height=10.0)
    line = draw([(0.0, 0.0), (10.0, 1e18), (300.0, 50.0), (700.0, 1.0)], axes)
    assert line.path == "M0.0 10.0L1.0 0.0M30.0 5.0h.1"
    assert (line.lowest, line.highest, line.latest) == (0.0, 1e18, None)
    assert draw([(595.0, 7.0)], axes).latest == 7.0
    assert draw([], axes).path == ""
    day = Axes(begin=0.0, end=86400.0, top=100.0, width=300.0, height=10.0)
    assert draw([(at * 10.0, 50.0) for at in range(8640)], day).path.count("L") < 310
    assert draw([(at * 10.0, 50.0) for at in range(8640)], day).path.count("M") == 1
    assert [round_top(value) for value in (0.0, 0.3, 1.0, 1.1, 45.0, 1e18)] == [
        1.0,
        0.5,
        1.0,
        2.0,
        50.0,
        1e18,
    ]
