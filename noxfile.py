"""How the project is checked: ``nox`` checks the code and runs all tests.

The sessions share one environment, the one that nox itself runs in: ``.venv``, as
``./bootstrap test`` makes it.  The libguestfs binding belongs to the distribution's
Python, so the environment is made from that Python and sees the system's packages.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

from vmprovision.runtime.store import cached_folder

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "quick", "heavy"]

AGENT = "vmprovision/agent"
OLDEST_PYTHONS = ("2.6", "3.2")  # that a guest may have
# A worker for each core; an appliance or a guest takes a core and half a gigabyte.
SIDE_BY_SIDE = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")
# The others wait for agents and programs more than they compute.
WAITING = ("-n", str(min(2 * (os.cpu_count() or 1), 8)), "--dist", "worksteal")
HEAVY = "appliance or boot"
# Three minutes on an idle host without KVM.
QUICK_BENCH = {
    "injection": ("--rounds", "1", "--only", r"^virt-customize|inject`$|pool=|together.* of 4$"),
    "layouts": ("--rounds", "1", "--only", "Ubuntu|Fedora|logical|/usr|nothing"),
    "breakdown": ("--rounds", "5"),
}


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, types, the import floors, and what old Pythons can run."""
    _run(session, "ruff", "check")
    _run(session, "ruff", "format", "--check")
    _run(session, "mypy")
    _run(session, "lint-imports", "--no-logo")
    targets = [f"--target={version}-" for version in OLDEST_PYTHONS]
    _run(session, "vermin", "--violations", "--no-tips", *targets, AGENT)
    inside = "vmprovision/appliance/inside/volumes"
    session.run("shellcheck", "bootstrap", ".ci/run", "ci/install", inside)


@nox.session
def quick(session: nox.Session) -> None:
    """Run the tests that start no appliance and no guest."""
    _run(session, "pytest", *WAITING, "-m", f"not ({HEAVY}) and not slow", *session.posargs)


@nox.session
def heavy(session: nox.Session) -> None:
    """Run the tests with an appliance, then the boots."""
    _run(session, "pytest", *SIDE_BY_SIDE, "-m", f"({HEAVY}) and not slow", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test, or those that the arguments choose."""
    _run(session, "pytest", *SIDE_BY_SIDE, *session.posargs)


@nox.session
def agent(session: nox.Session) -> None:
    """Test the guest agent on every interpreter of this host."""
    _run(session, "pytest", *WAITING, "tests/agent", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Send 100,000 malformed requests to an agent of each family of interpreters."""
    _run(session, "python", "-m", "tests.agent.fuzz", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure, beside what others have, and write docs/; --quick: a part, and write nothing."""
    if "--quick" in session.posargs:
        for part, words in QUICK_BENCH.items():
            _run(session, "python", "-m", f"tests.bench.{part}", *words, "--dry")
        return
    session.run(sys.executable, "-m", "pip", "install", "--quiet", "--editable", ".[bench]")
    _run(session, "python", "-m", "tests.bench.agent")
    _run(session, "python", "-m", "tests.bench.injection", *session.posargs)
    _run(session, "python", "-m", "tests.bench.layouts")
    _run(session, "python", "-m", "tests.bench.breakdown")


@nox.session
def browser(session: nox.Session) -> None:
    """Use the server's pages in Chromium; with ``--screenshots docs`` take the pictures there."""
    if shutil.which("chromium") is None:
        session.error("Chromium is not installed: apt-get install chromium fonts-inter")
    session.run(sys.executable, "-m", "pip", "install", "--quiet", "--editable", ".[browser]")
    _run(
        session, "pytest", "-n", "0", "-m", "slow", "tests/server/test_browser.py", *session.posargs
    )


@nox.session
def soak(session: nox.Session) -> None:
    """Restore the saved appliance a thousand times, each disk and identity checked."""
    _run(session, "python", "-m", "tests.appliance.soak", *session.posargs)


@nox.session
def scale(session: nox.Session) -> None:
    """Inject into a thousand images in one batch that is killed and resumed; write the table."""
    _run(session, "python", "-m", "tests.bench.scale", *session.posargs)


@nox.session
def crash(session: nox.Session) -> None:
    """Kill 500 runs at every moment, look at each image, and write the table in docs/safety.md."""
    _run(session, "python", "-m", "tests.crash.matrix", *session.posargs)


@nox.session
def hostile(session: nox.Session) -> None:
    """Read hostile guests, images and neighbours, then mutated ones for ten minutes."""
    _run(session, "pytest", *SIDE_BY_SIDE, "tests/hostile", "tests/image/test_hostile.py")
    _run(session, "python", "-m", "tests.hostile.fuzz", *session.posargs)


@nox.session
def boot(session: nox.Session) -> None:
    """Run the tests that boot a guest."""
    _run(session, "pytest", *SIDE_BY_SIDE, "-m", "boot", *session.posargs)


@nox.session(name="boot-matrix")
def boot_matrix(session: nox.Session) -> None:
    """Boot every recipe, look at every real tree, and write docs/support-matrix.md."""
    session.run(sys.executable, "-m", "pip", "install", "--quiet", "--editable", ".[runtimes]")
    _run(session, "vmprovision", "runtime", "build", "all")
    _run(session, "python", "-m", "tests.proof.matrix", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Run what the default run leaves out: more layouts, more moments of interruption."""
    _run(session, "pytest", *SIDE_BY_SIDE, "-m", "slow", *session.posargs)


@nox.session
def runtimes(session: nox.Session) -> None:
    """Build the runtimes of all architectures and test each, foreign ones under qemu-user."""
    session.run(sys.executable, "-m", "pip", "install", "--quiet", "--editable", ".[runtimes]")
    _run(session, "vmprovision", "runtime", "build", "all")
    _run(session, "vmprovision", "runtime", "verify")
    _run(session, "pytest", "-m", "not appliance", "tests/runtime", *session.posargs)


@nox.session
def manual(session: nox.Session) -> None:
    """Write the manual pages and shell completions into build/man."""
    _run(session, "python", "-m", "release.manual", "build/man")


@nox.session
def site(session: nox.Session) -> None:
    """Build the documentation site into build/site/html; a dead link is an error."""
    session.run(sys.executable, "-m", "pip", "install", "--quiet", "--editable", ".[site]")
    _run(session, "python", "-m", "release.site", "build/site")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the sdist, and from it the wheel with all runtimes, into dist/; twice, and compare."""
    session.run(sys.executable, "-m", "pip", "install", "--quiet", "--editable", ".[release]")
    runtimes(session)
    shipped = Path("vmprovision/runtimes")
    shutil.rmtree(shipped, ignore_errors=True)
    try:
        shutil.copytree(cached_folder(), shipped)
        manual(session)
        built = [_build(session, Path(folder)) for folder in ("dist", "build/again")]
    finally:
        shutil.rmtree(shipped, ignore_errors=True)
    if built[0] != built[1]:
        session.error("two builds of the same source differ")


@nox.session
def deb(session: nox.Session) -> None:
    """Build the Debian package into dist/, in a fresh Debian 13, from the sdist there; as root."""
    (source,) = Path("dist").glob("vmprovision-*.tar.gz")
    _run(session, "python", "-m", "tests.release.deb", str(source), "dist")


@nox.session
def install(session: nox.Session) -> None:
    """Install what dist/ holds in fresh Debians, inject there, and bake as CI does; as root."""
    _run(session, "pytest", "-n", "0", "-rP", "-m", "slow", "tests/release", *session.posargs)


def _build(session: nox.Session, folder: Path) -> dict[str, bytes]:
    """Build the sdist and the wheel from it; return what the folder then has."""
    shutil.rmtree(folder, ignore_errors=True)
    _run(session, "python", "-m", "build", "--no-isolation", "--outdir", str(folder))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _run(session: nox.Session, program: str, *arguments: str) -> None:
    """Run a program of this environment, whether or not that is activated."""
    session.run(str(Path(sys.executable).with_name(program)), *arguments)
