"""Fixtures and options of all tests: the command line, a real image, and how tests are skipped."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from vmprovision.doctor import examine_host
from vmprovision.progress import Control
from vmprovision.recipe import build_image

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CLI_SECONDS = 600.0  # a loaded CI host without KVM
DEBIAN_RECIPE = "debian-12-systemd"


class RunCli(Protocol):
    """Run ``vmprovision`` as a user does, in a process of its own."""

    def __call__(
        self,
        *args: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = CLI_SECONDS,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Return the finished process, with its standard output and error as text.

        Args:
            args: what follows ``vmprovision`` on the command line.
            check: fail the test, with the output, unless the exit code is 0.
            env: variables to set besides those of this process.
            timeout: seconds after which the process is killed and the test fails.
            cwd: the directory to run it in; default: this one.
        """


def require(condition: object, reason: str, *, optional: bool = False) -> None:
    """Skip the test if this host lacks something; fail it if ``CI`` is set.

    Every skip goes through here, so that CI cannot pass by running nothing.

    Args:
        condition: what the test needs; any false value means that it is absent.
        reason: what is absent, and the command or page that helps.
        optional: skip in CI too. For what a CI host need not have: root, a module of the
            kernel, a build or a download that takes a command of its own.
    """
    if condition:
        return
    if os.environ.get("CI") and not optional:
        pytest.fail(reason)
    pytest.skip(reason)


def require_root() -> None:
    """Skip the test unless root runs it: it changes users, owners or namespaces."""
    require(os.geteuid() == 0, "only root can run this test", optional=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that tests in other processes wait for."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of this run, which its worker processes share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--kvm``, which simulates a host whose KVM hangs or fails, and ``--screenshots``."""
    parser.addoption(
        "--kvm",
        choices=("hangs", "fails"),
        help="run on a QEMU of which only KVM hangs, or fails",
    )
    parser.addoption(
        "--screenshots",
        metavar="FOLDER",
        help="where the browser's tests put the pictures of the pages, such as docs",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put the broken QEMU where libguestfs and vmprovision find it; worker processes inherit it."""
    behaviour = config.getoption("--kvm")
    if behaviour and not hasattr(config, "workerinput"):
        from tests.kvm import broken_qemu  # noqa: PLC0415 -- it imports this module

        folder = tempfile.TemporaryDirectory(prefix="vmprovision-kvm-")
        config.add_cleanup(folder.cleanup)
        Path(folder.name).chmod(0o755)  # libvirt's user starts it, too
        qemu = broken_qemu(Path(folder.name), behaviour)
        os.environ["LIBGUESTFS_HV"] = str(qemu)
        os.environ["PATH"] = f"{folder.name}:{os.environ['PATH']}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the quick tests first, then those with an appliance, then the boots."""
    items.sort(key=lambda item: [bool(item.get_closest_marker(m)) for m in ("boot", "appliance")])


@pytest.fixture(scope="session")
def _host_faults() -> list[str]:
    """Return what ``vmprovision doctor`` finds missing, with the command that fixes each."""
    return [
        f"{finding.subject}: {finding.detail}; fix: {finding.fix}"
        for finding in examine_host()
        if finding.needed and not finding.ok
    ]


@pytest.fixture(autouse=True)
def _usable_host(request: pytest.FixtureRequest) -> None:
    """Skip tests marked ``appliance`` or ``boot`` if libguestfs or QEMU cannot work here."""
    if any(request.node.get_closest_marker(name) for name in ("appliance", "boot")):
        faults: list[str] = request.getfixturevalue("_host_faults")
        require(not faults, "; ".join(faults))


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """Return a function that runs ``vmprovision`` with the given arguments."""

    def run(
        *args: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = CLI_SECONDS,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "vmprovision", *map(str, args)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=timeout,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
        if check and done.returncode:
            pytest.fail(f"exit code {done.returncode} of {done.args}\n{done.stdout}{done.stderr}")
        return done

    return run


@pytest.fixture(scope="session")
def debian_image_source() -> Path:
    """Return the cached Debian image, for reading only; to write, use ``fresh_debian``."""
    for program in ("mmdebstrap", "extlinux"):
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        require(shutil.which(program, path=path), f"{program} is not installed")
    return build_image(DEBIAN_RECIPE, control=Control())


@pytest.fixture
def fresh_debian(debian_image_source: Path, tmp_path: Path) -> Path:
    """Return a copy of the Debian image that the test may write to."""
    copy = tmp_path / "debian.qcow2"
    subprocess.run(
        ["cp", "--reflink=auto", "--sparse=always", debian_image_source, copy], check=True
    )
    copy.chmod(0o644)
    return copy
