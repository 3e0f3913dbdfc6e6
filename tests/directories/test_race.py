"""Somebody changes a tree while it is injected: nothing outside it is read or written."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import stat
from typing import TYPE_CHECKING

import pytest

import vmprovision
from tests.trees import SYSTEMD_TREE, make_tree, tree_state
from vmprovision.filesystem import inroot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROUNDS = 40
SECRET = b"of the host alone"
SWAPPED = ("usr/local/bin", "usr/local/lib", "etc/systemd/system", "etc/systemd")


def _swap(root: Path, outside: Path, counter: object) -> None:
    """Replace each directory in turn with a link to the outside, for ever."""
    while True:
        for name in SWAPPED:
            place, aside = root / name, root / f"{name}.aside"
            with contextlib.suppress(OSError):
                place.rename(aside)
                place.symlink_to(outside)
            counter.value += 1  # type: ignore[attr-defined]  # of multiprocessing
            with contextlib.suppress(OSError):
                if place.is_symlink():
                    place.unlink()
                aside.rename(place)


@contextlib.contextmanager
def _swapping(root: Path, outside: Path) -> Iterator[object]:
    context = multiprocessing.get_context("fork")
    counter = context.Value("Q", 0, lock=False)
    attacker = context.Process(target=_swap, args=(root, outside, counter), daemon=True)
    attacker.start()
    try:
        yield counter
    finally:
        assert attacker.pid is not None
        os.kill(attacker.pid, signal.SIGKILL)
        attacker.join()


@pytest.fixture(params=["openat2", "walk"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolve paths by the kernel, or step by step as on older kernels."""
    if request.param == "walk":

        def not_implemented(*_arguments: object) -> int:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(inroot, "_openat2", not_implemented)


@pytest.mark.usefixtures("way")
def test_a_directory_that_turns_into_a_link_leads_nowhere(tmp_path: Path) -> None:
    """While directories become links during injections and removals, the host's files stay."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    make_tree(root, {**SYSTEMD_TREE, "/usr/local/lib/guest-agent": None})
    names = ("guest-agent", "guest-agent.service", "receipt.json", "00-guest-agent.preset")
    make_tree(outside, dict.fromkeys(names, SECRET))
    make_tree(outside, {f"{folder}/{names[0]}": SECRET for folder in ("bin", "system")})
    for path in outside.rglob("*"):
        path.chmod(0o700)
    before = tree_state(outside)
    done = 0
    with _swapping(root, outside) as counter:
        while done < ROUNDS or counter.value < 2000:  # type: ignore[attr-defined]  # likewise
            with contextlib.suppress(vmprovision.VmprovisionError):
                vmprovision.inject(root, vmprovision.InjectOptions(init="systemd"))
            with contextlib.suppress(vmprovision.VmprovisionError):
                vmprovision.remove(root)
            done += 1
    assert tree_state(outside) == before
    for path in root.rglob("*"):
        if stat.S_ISREG(path.lstat().st_mode):
            assert SECRET not in path.read_bytes(), path
