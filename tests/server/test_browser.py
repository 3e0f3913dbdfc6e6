"""The pages in Debian's Chromium, without a window: with and without JavaScript, by keyboard alone.

``nox -s browser`` installs playwright, which drives it, and runs these tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import require
from tests.server.conftest import serving
from tests.server.shown import insert_machines, insert_samples, insert_vm
from tests.server.test_api import change
from tests.server.test_pages import ADMIN, HOSTILE, READER, TOKENS
from vmprovision.server.app import make_app
from vmprovision.server.limits import Gate
from vmprovision.server.queries import list_vms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, BrowserContext, Page

    from vmprovision.server.services import Services

pytestmark = pytest.mark.slow

MILLISECONDS = 120_000  # a loaded host
LARGEST_PICTURE = 150_000
PICTURES = (("machines", "light"), ("machine", "dark"))  # of docs/serve.md
CONTRAST = 4.5  # WCAG 2.2, 1.4.3
# The least contrast of any text with the ground that is seen behind it.
LEAST_CONTRAST = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92
      : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.getClientRects().length) continue;
    if (["SCRIPT", "NOSCRIPT"].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const paint = e instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(parse(paint)), light(ground(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walker.currentNode.data.trim()]);
  }
  return found.sort((x, y) => x[0] - y[0])[0];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return Chromium."""
    program = shutil.which("chromium")
    require(program, "Chromium is not installed: apt-get install chromium", optional=True)
    driver = importlib.util.find_spec("playwright")
    require(driver, "playwright is not installed: nox -s browser", optional=True)
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 -- only if it is there

    with sync_playwright() as playwright:
        options = ["--no-sandbox"]  # it refuses to run as root with it; the pages are our own
        started = playwright.chromium.launch(executable_path=program, args=options)
        yield started
        started.close()


@pytest.fixture
def url(services: Services) -> Iterator[str]:
    """Return the URL of a server without workers."""
    with serving(Gate(make_app(services), services.settings)) as found:
        yield found


@contextlib.contextmanager
def opened(
    browser: Browser,
    url: str,
    *,
    refusals: tuple[int, ...] = (),
    **options: Any,  # noqa: ANN401 -- playwright's
) -> Iterator[Page]:
    """Give a page of a browser without a past; it must load nothing foreign and have no error.

    Args:
        browser: where.
        url: the server's.
        refusals: statuses of the server that belong to the test; the browser calls them errors.
        options: of the browser's context.
    """
    expected = tuple(f"status of {status}" for status in refusals)
    context: BrowserContext = browser.new_context(base_url=url, **options)
    context.set_default_timeout(MILLISECONDS)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}"))

    def on_console(said: Any) -> None:  # noqa: ANN401 -- likewise
        if said.type == "error" and not any(words in said.text for words in expected):
            faults.append(said.text)

    def on_request(asked: Any) -> None:  # noqa: ANN401 -- likewise
        if not asked.url.startswith(url):
            faults.append(f"asked {asked.url}")

    page.on("console", on_console)
    page.on("request", on_request)
    yield page
    context.close()
    assert faults == []


def test_a_page_that_is_open_stays_true(browser: Browser, url: str, services: Services) -> None:
    """New machines and new phases appear without a reload, are announced, and keep the focus."""
    store = services.store
    first = insert_vm(store, "first", "disk")
    with opened(browser, url) as page:
        page.goto("/")
        page.evaluate("window.isSame = true")
        link = page.get_by_role("link", name="first")
        link.focus()
        second = insert_vm(store, "second", "requested")
        page.get_by_role("link", name="second").wait_for()
        status = page.get_by_role("status").filter(has_text="2 virtual machines")
        status.filter(has_text="1 disk, 1 requested").wait_for()
        change(store, first, phase="ready", domain_state="running")
        page.get_by_role("row", name="first").get_by_text("ready").wait_for()
        status.filter(has_text="1 ready, 1 requested").wait_for()
        assert page.evaluate("document.activeElement.id") == f"vm-{first}"
        link.press("Enter")
        page.wait_for_url(f"**/vms/{first}")
        insert_samples(store, first, level=20, seconds=120)
        page.get_by_role("img", name="CPU over the last 1h").wait_for()
        folder = services.settings.state / "vms" / first
        folder.mkdir(parents=True)
        (folder / "console.log").write_text("login:\n")
        page.get_by_text("login:").wait_for()
        page.goto("/")
        page.evaluate("window.isSame = true")
        change(store, second, phase="injected")
        page.get_by_role("row", name="second").get_by_text("injected").wait_for()
        assert page.evaluate("window.isSame")
        page.get_by_role("link", name="Stop updates").click()
        page.get_by_role("link", name="Update again").wait_for()
        assert page.evaluate("typeof htmx") == "undefined"


def test_without_javascript(browser: Browser, url: str, services: Services) -> None:
    """Everything works: create, wait, look, stop, delete after a question."""
    with opened(browser, url, refusals=(422,), java_script_enabled=False) as page:
        page.goto("/")
        page.get_by_role("link", name="Create the first machine").click()
        page.get_by_label("Name").fill("web")
        page.get_by_label("Tags").fill("a, b")
        page.get_by_label("Memory in MiB").fill("128")
        page.get_by_role("button", name="Create machine").click()
        page.get_by_role("heading", name="web", level=1).wait_for()
        (vm,) = list_vms(services.store)
        assert (vm.tags, vm.mem_mib) == (["a", "b"], 128)
        page.reload()  # Post/Redirect/Get: nothing is sent again
        change(services.store, vm.id, phase="ready", domain_state="running")
        page.get_by_role("link", name="load it again").click()
        page.get_by_role("status").get_by_text("ready").wait_for()
        page.get_by_role("button", name="Pause").click()
        assert list_vms(services.store)[0].wanted == "paused"
        page.get_by_role("link", name="Delete").click()
        page.get_by_role("link", name="Keep it").click()
        assert list_vms(services.store)[0].wanted == "paused"
        page.get_by_role("link", name="Delete").click()
        page.get_by_role("button", name="Delete the machine and its disk").click()
        page.get_by_role("row", name="web").get_by_text("deleting").wait_for()
        assert list_vms(services.store)[0].wanted == "deleted"
        page.get_by_role("link", name="Templates").click()
        page.get_by_role("link", name="Register an image").click()
        page.get_by_label("Name").fill("x")
        page.get_by_label("Image").fill("/etc/passwd")
        page.get_by_role("button", name="Inspect and register").click()
        page.get_by_role("alert").get_by_text("no such image below").wait_for()
        assert page.get_by_label("Image").input_value() == "/etc/passwd"


def tab_to(page: Page, name: str) -> None:
    """Press Tab until the element with this text or name has the focus, and shows that it has."""
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "() => { const e = document.activeElement;"
            " return [e.innerText || e.name, getComputedStyle(e).outlineStyle]; }"
        )
        if found[0] == name:
            assert found[1] == "solid"
            return
    pytest.fail(f"Tab does not reach {name}")


def test_by_keyboard_alone(browser: Browser, url: str, services: Services) -> None:
    """A machine is created and deleted without a mouse; a wrong form leads to its faults."""
    with opened(browser, url, refusals=(422,)) as page:
        page.goto("/")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.innerText") == "Skip to the content"
        tab_to(page, "Create the first machine")
        page.keyboard.press("Enter")
        page.wait_for_url("**/vms/new")
        tab_to(page, "name")
        page.keyboard.type("by-keyboard")
        tab_to(page, "mem_mib")
        page.keyboard.type("3")
        page.keyboard.press("Enter")
        page.get_by_role("alert").wait_for()
        assert page.evaluate("document.activeElement.id") == "faults"
        assert page.get_by_label("Name").input_value() == "by-keyboard"
        tab_to(page, "mem_mib")
        page.keyboard.press("Control+A")
        page.keyboard.type("64")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="by-keyboard").wait_for()
        assert [vm.mem_mib for vm in list_vms(services.store)] == [64]
        tab_to(page, "Delete\u2026")
        page.keyboard.press("Enter")
        page.wait_for_url("**/delete")
        tab_to(page, "Delete the machine and its disk")
        page.keyboard.press("Enter")
        page.get_by_role("row", name="by-keyboard").get_by_text("deleting").wait_for()


def test_hostile_text_runs_nothing(browser: Browser, url: str, services: Services) -> None:
    """Names, tags, errors and a console full of markup are text, in replaced parts too."""
    made = ""
    for number, name in enumerate(HOSTILE):
        error = {"detail": f"{name}\x1b[2J", "hint": name, "kind": "X"}
        made = insert_vm(services.store, name, "silent", error=error, tags=[f"{number}{name[:40]}"])
        folder = services.settings.state / "vms" / made
        folder.mkdir(parents=True)
        (folder / "console.log").write_text("".join(f"{each}\n" for each in HOSTILE))
        with opened(browser, url) as page:
            for path in ("/", f"/vms/{made}", f"/vms/{made}/delete"):
                page.goto(path)
                page.get_by_text(name, exact=True).first.wait_for()
                assert (
                    page.evaluate("document.querySelectorAll('main script, main img').length") == 0
                )
    with opened(browser, url) as page:
        page.goto(f"/vms/{made}")
        with (services.settings.state / "vms" / made / "console.log").open("a") as console:
            console.write("<img src=x onerror=alert(1)><i hx-get=/ hx-trigger=load>end</i>\n")
        page.get_by_text("hx-trigger=load").wait_for()  # it came by a replaced part


def test_logging_in(browser: Browser, services: Services) -> None:
    """The token is in no address, page or storage, and no script reads the cookie."""
    settings = dataclasses.replace(services.settings, tokens=TOKENS)
    app = make_app(dataclasses.replace(services, settings=settings))
    insert_vm(services.store, "web")
    with (
        serving(Gate(app, settings)) as url,
        opened(browser, url, refusals=(401, 403)) as page,
    ):
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto("/")
        assert page.evaluate("document.activeElement.id") == "token"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.get_by_role("alert").wait_for()
        page.get_by_label("Token").fill(ADMIN)
        page.keyboard.press("Enter")
        page.get_by_role("link", name="New machine").wait_for()
        (cookie,) = page.context.cookies()
        assert (cookie.get("httpOnly"), cookie.get("sameSite")) == (True, "Strict")
        assert ADMIN not in str(cookie)
        assert page.evaluate("document.cookie + JSON.stringify({...localStorage})") == "{}"
        assert ADMIN not in page.content()
        assert not any(ADMIN in address for address in asked)
        page.get_by_role("button", name="Log out").click()
        page.get_by_label("Token").fill(READER)
        page.keyboard.press("Enter")
        page.get_by_text("read only").wait_for()
        assert page.get_by_role("link", name="New machine").count() == 0
        page.context.clear_cookies()  # as when the session ends
        page.wait_for_url("**/login?next=/")


def test_a_server_that_is_gone(browser: Browser, services: Services) -> None:
    """A page that is open says that what it shows is old."""
    gate = Gate(make_app(services), services.settings)
    context = browser.new_context()
    with serving(gate) as url:
        page = context.new_page()
        page.goto(url)
    page.get_by_text("The server does not answer").wait_for(timeout=MILLISECONDS)
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_it(  # noqa: PLR0913, PLR0917 -- fixtures
    browser: Browser,
    url: str,
    services: Services,
    scheme: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """Enough contrast in both schemes, and no scrolling sideways; the pictures of docs/."""
    ids = insert_machines(services)
    shown = {"machines": "/", "machine": f"/vms/{ids['web-1']}", "broken": f"/vms/{ids['broken']}"}
    shown |= {"new": "/vms/new", "templates": "/templates", "docs": "/docs"}
    folder = Path(request.config.getoption("--screenshots") or tmp_path)
    size = {"width": 1100, "height": 640}
    with opened(browser, url, color_scheme=scheme, viewport=size) as page:
        for name, path in shown.items():
            page.set_viewport_size({"width": 1100, "height": 880 if name == "machine" else 640})
            page.goto(path)
            least, text = page.evaluate(LEAST_CONTRAST)
            assert least >= CONTRAST, (name, text)
            if (name, scheme) in PICTURES:
                picture = folder / f"serve-{name}-{scheme}.png"
                page.screenshot(path=picture)
                assert 10_000 < picture.stat().st_size < LARGEST_PICTURE
            page.set_viewport_size({"width": 360, "height": 640})
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
