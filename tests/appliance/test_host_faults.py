"""Faults of the host while an appliance works: a full disk, a killed QEMU, a killed session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import vmprovision
from tests.appliance import full
from tests.conftest import require
from tests.image.tiny import tiny_disk
from vmprovision.appliance.drives import Drive
from vmprovision.appliance.session import open_appliance
from vmprovision.appliance.snapshot.host import STOCK_VARIABLE, host_appliance
from vmprovision.host.cache import CACHE_VARIABLE, cache_directory
from vmprovision.progress import Control, Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.appliance

WAYS = {"restored": "", "stock": "1"}
DEATH_SECONDS = 20.0
CLOCK_SOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
INJECT = """
import sys, vmprovision
from vmprovision.progress import Control
def tell(progress):
    print(progress.step, flush=True)
vmprovision.inject(sys.argv[1], vmprovision.InjectOptions(), control=Control(report=tell))
"""


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The appliance: restored, or a stock one."""
    monkeypatch.delenv(STOCK_VARIABLE, raising=False)
    if request.param == "stock":
        monkeypatch.setenv(STOCK_VARIABLE, "1")
    else:
        require(host_appliance(Control()), "no appliance can be saved here")
    return str(request.param)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A tiny guest."""
    return tiny_disk(tmp_path / "tiny.raw", {})


def test_a_full_disk_ends_the_work_at_once(way: str, image: Path, tmp_path: Path) -> None:
    """The error names the full disk, the image is unchanged, and nothing is left beside it."""
    namespace = ["unshare", "--mount", "--propagation", "private"]
    if os.geteuid():
        namespace.append("--map-root-user")
    is_allowed = subprocess.run([*namespace, "true"], check=False, capture_output=True)
    require(is_allowed.returncode == 0, "no mount namespace can be made here")
    folder = tmp_path / way
    folder.mkdir()
    done = subprocess.run(
        [*namespace, sys.executable, full.__file__, folder, image],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    assert outcome["kind"] == "ImageSpaceError", outcome
    assert "disk is full" in outcome["message"]
    assert outcome["untouched"]
    assert outcome["left"] == ["filler", image.name]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("way", "step"),
    [
        ("restored", "inspecting the guest"),
        ("restored", "verifying"),
        ("stock", "inspecting the guest"),
        pytest.param("stock", "verifying", marks=pytest.mark.slow),
    ],
    indirect=["way"],
)
def test_a_killed_qemu_is_one_clear_error(step: str, image: Path) -> None:
    """At any time, and without naming fsck or libguestfs's own calls."""
    before = image.read_bytes()

    def kill(progress: Progress) -> None:
        if progress.step == step:
            for process in appliances():
                os.kill(process, signal.SIGKILL)

    with pytest.raises(vmprovision.VmprovisionError) as caught:
        vmprovision.inject(image, vmprovision.InjectOptions(), control=Control(report=kill))
    assert caught.value.as_json()["kind"] == "ApplianceEndedError", caught.value
    assert "ended" in caught.value.message
    assert image.read_bytes() == before


def appliances(parent: int | None = None) -> Iterator[int]:
    """Yield the QEMUs that a process has started, by default this one."""
    parent = parent or os.getpid()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if b"virtio-scsi" in words and int(fields[1]) == parent:
            yield int(entry.name)


def test_a_killed_session_leaves_nothing_behind_the_next_one(
    way: str, image: Path, tmp_path: Path
) -> None:
    """Neither its own folder nor libguestfs's, nor anything in the temporary directory."""
    ours = tmp_path / "t"
    ours.mkdir()
    environment = {**os.environ, "TMPDIR": str(ours)}
    process = subprocess.Popen(
        [sys.executable, "-c", INJECT, image],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout
    for line in process.stdout:
        if line == "inspecting the guest\n":
            break
    (machine,) = appliances(process.pid)
    words = Path(f"/proc/{machine}/cmdline").read_text().split("\0")
    session = Path(words[words.index("-name") + 1])
    assert session.parent == cache_directory() / "run", way
    (elsewhere,) = (session / "elsewhere").read_text().splitlines()
    assert Path(elsewhere).name.startswith("libguestfs")
    variables = Path(f"/proc/{machine}/environ").read_text().split("\0")
    assert f"TMPDIR={session}" in variables, "QEMU leaves the file of its snapshot elsewhere"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until_gone(machine)
    # it is still there, unless a session of another test has already removed it
    environment[STOCK_VARIABLE] = ""  # whichever appliance comes next
    subprocess.run(
        [sys.executable, "-c", INJECT, image], check=True, env=environment, capture_output=True
    )
    assert not session.exists()
    assert not Path(elsewhere).exists()
    assert not list(ours.glob("[!.]*"))  # libguestfs's cache is hidden there


@pytest.mark.parametrize(
    "way", ["restored", pytest.param("stock", marks=pytest.mark.slow)], indirect=True
)
def test_no_appliance_counts_time_by_the_processor(way: str, image: Path) -> None:
    """On TCG the TSC is the host's, which ran far too fast in an appliance."""
    drive = Drive(path=image, format="raw", readonly=True)
    with open_appliance([drive], control=Control()) as appliance:
        clock = appliance.call("debug", "sh", [f"cat {CLOCK_SOURCE}"]).strip()
    assert clock not in {"", "tsc"}, way


def wait_until_gone(process: int) -> None:
    """Wait until a process has ended."""
    ends = time.monotonic() + DEATH_SECONDS
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < ends, "it outlives the session that started it"
        time.sleep(0.05)


def test_other_users_files_in_the_temporary_directory_do_not_block(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipes, links and folders with the names of sessions are ignored, and stay."""
    victim = tmp_path / "victim"
    victim.mkdir()
    shared = tmp_path / "shared"
    shared.mkdir()
    planted = shared / "vmprovision-session-x"
    planted.mkdir(mode=0o777)
    planted.chmod(0o777)
    os.mkfifo(planted / "lock")
    os.mkfifo(shared / "vmprovision-session-y")
    (shared / "vmprovision-session-z").symlink_to(victim)
    monkeypatch.setenv("TMPDIR", str(shared))
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)  # so that sessions are in the temporary directory
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    os.mkfifo(cache / "run")
    code = f"import tempfile; tempfile.tempdir = None\n{INJECT}"
    command = [sys.executable, "-c", code, str(image)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert victim.is_dir()
    names = ["vmprovision-session-x", "vmprovision-session-y", "vmprovision-session-z"]
    assert sorted(path.name for path in shared.glob("[!.]*")) == names
