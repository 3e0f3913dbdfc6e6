"""A run on a directory is killed before any of its system calls; the next run ends as if not."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

import vmprovision
from tests.trees import SYSTEMD_TREE, Link, Tree, make_tree, tree_state
from vmprovision.errors import ImageLockedError
from vmprovision.filesystem import inroot

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Every call that changes something on a disk, or makes it durable.
CALLS = ("rename", "mkdir", "rmdir", "unlink", "symlink", "fsync", "fchmod")
TREE: Tree = {
    **SYSTEMD_TREE,
    "/etc/rc.local": "#!/bin/sh\necho hello\nexit 0",
    "/usr/local/bin/guest-agent": b"\x00somebody else's\xff",
    "/etc/guest-agent.conf": Link("/srv/agent.conf"),
    "/srv/agent.conf": "VM_ID=theirs\n",
}
STEP = int(os.environ.get("VMPROVISION_CRASH_STEP", "4"))  # 1: before every single call


def _inject(root: Path) -> None:
    vmprovision.inject(root, vmprovision.InjectOptions(vm_id="a"))


def _inject_standalone(root: Path) -> None:
    vmprovision.inject(root, vmprovision.InjectOptions(vm_id="b", init="standalone"))


@dataclass(frozen=True)
class Case:
    """A change that is killed, and what was done to the tree before."""

    earlier: tuple[Callable[[Path], object], ...]
    change: Callable[[Path], object]


CASES = {
    "first": Case(earlier=(), change=_inject),
    "edit": Case(earlier=(), change=_inject_standalone),
    "another init system": Case(earlier=(_inject,), change=_inject_standalone),
    "back": Case(earlier=(_inject_standalone,), change=_inject),
    "removal": Case(earlier=(_inject_standalone,), change=vmprovision.remove),
    "removal of links": Case(earlier=(_inject,), change=vmprovision.remove),
}


def _run_until(change: Callable[[Path], object], root: Path, limit: int, count: Any) -> None:  # noqa: ANN401 -- of multiprocessing
    """Carry out a change, and die before the system call of this number."""

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 -- as os has it
            if count.value == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            count.value += 1
            return call(*arguments, **options)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    made = inroot.Root.put

    def put(self: inroot.Root, path: Any, make: Callable[[int, str], None]) -> None:  # noqa: ANN401 -- as it has it
        made(self, path, counted(make))

    inroot.Root.put = put  # type: ignore[method-assign]  # in a process of its own
    change(root)


def _kill_before(change: Callable[[Path], object], root: Path, limit: int) -> tuple[bool, int]:
    """Return whether the change was killed, and how many calls it had made."""
    context = multiprocessing.get_context("fork")
    count = context.Value("q", 0, lock=False)
    child = context.Process(target=_run_until, args=(change, root, limit, count))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0, int(count.value)


def _copy(tree: Path, to: Path) -> Path:
    shutil.copytree(tree, to, symlinks=True)
    return to


@pytest.mark.parametrize("name", CASES)
def test_the_next_run_ends_as_if_nobody_had_been_killed(tmp_path: Path, name: str) -> None:
    """After a kill, the same change gives the same tree, and ``remove`` the original tree."""
    case = CASES[name]
    original = make_tree(tmp_path / "original", TREE)
    started = _copy(original, tmp_path / "started")
    for change in case.earlier:
        change(started)
    finished = _copy(started, tmp_path / "finished")
    killed, calls = _kill_before(case.change, finished, -1)
    assert not killed
    assert calls > 20
    wanted = tree_state(finished)
    for limit in range(0, calls, STEP):
        root = _copy(started, tmp_path / "root")
        killed, _ = _kill_before(case.change, root, limit)
        assert killed
        other = _copy(root, tmp_path / "other")
        _repeat(case.change, root)
        assert tree_state(root) == wanted, f"again after call {limit}"
        _repeat(vmprovision.remove, other)
        assert tree_state(other) == tree_state(original), f"removed after call {limit}"
        shutil.rmtree(root)
        shutil.rmtree(other)


def _repeat(change: Callable[[Path], object], root: Path) -> None:
    """Repeat the change; a removal may find nothing begun or everything done."""
    if change is vmprovision.remove and vmprovision.inspect(root).agent is None:
        with pytest.raises(vmprovision.PlanError, match="has no injected agent"):
            change(root)
    else:
        change(root)


def test_a_killed_run_is_seen(tmp_path: Path) -> None:
    """``inspect`` and ``verify`` report a killed run until another run completes it."""
    make_tree(tmp_path, TREE)
    killed, _ = _kill_before(_inject, tmp_path, 30)
    assert killed
    agent = vmprovision.inspect(tmp_path).agent
    assert agent is not None
    assert agent.unfinished
    assert "interrupted" in vmprovision.verify(tmp_path).mismatches[0]
    _inject(tmp_path)
    assert not vmprovision.verify(tmp_path).mismatches


def test_two_runs_do_not_mix(tmp_path: Path) -> None:
    """While one run works in a directory, another one is refused."""
    make_tree(tmp_path, TREE)
    with (
        inroot.Root(tmp_path).locked(),
        pytest.raises(ImageLockedError, match="is working"),
    ):
        vmprovision.inject(tmp_path)
    vmprovision.inspect(tmp_path)
    vmprovision.inject(tmp_path)
