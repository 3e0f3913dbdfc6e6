"""Who supervises a running agent, judged by what its ``/info`` says: a guest's claim."""

from __future__ import annotations

from typing import Any

import pytest

from vmprovision.guest.facts import INIT_SYSTEMS, InitVerdict
from vmprovision.initsystem import definition_of

UNIT = "/system.slice/guest-agent.service"
# what an agent shows that the init system, in this dialect, really supervises
SUPERVISED: dict[tuple[str, str], dict[str, Any]] = {
    ("systemd", ""): {"pid1": "systemd", "cgroup": UNIT},
    ("systemd", "static-user"): {"pid1": "systemd", "cgroup": UNIT},
    # the kernel keeps fifteen characters of a process's name
    ("openrc", "supervise-daemon"): {"parent": {"pid": 9, "comm": "supervise-daemo"}},
    ("openrc", "openrc-run"): {"parent": {"pid": 9, "comm": "sh"}},
    ("openrc", "runscript"): {"parent": {"pid": 9, "comm": "sh"}},
    **{
        ("sysv", dialect): {"parent": {"pid": 9, "comm": "guest-agent"}}
        for dialect in ("redhat", "debian", "debian-startpar", "suse", "suse-startpar")
    },
    ("slackware", ""): {"parent": {"pid": 9, "comm": "rc.guest-agent"}},
    ("upstart", ""): {"parent": {"pid": 1, "comm": "init"}},
    ("runit", "usual"): {"pid1": "systemd", "parent": {"pid": 9, "comm": "runsv"}},
    ("runit", "artix"): {"pid1": "runit", "parent": {"pid": 9, "comm": "runsv"}},
    ("dinit", ""): {"parent": {"pid": 9, "comm": "dinit"}},
    ("dinit", "boot"): {"parent": {"pid": 1, "comm": "init"}},
    ("s6", "rc.local"): {"parent": {"pid": 9, "comm": "sh"}},
    ("s6", "scandir"): {"parent": {"pid": 9, "comm": "s6-supervise"}},
    ("finit", ""): {"parent": {"pid": 1, "comm": "finit"}},
    ("procd", ""): {"pid1": "procd", "parent": {"pid": 1, "comm": "procd"}},
    ("busybox", ""): {"parent": {"pid": 1, "comm": "init"}},
    ("busybox", "rcS"): {"parent": {"pid": 9, "comm": "sh"}},
    ("standalone", ""): {"pid1": "systemd", "cgroup": "/system.slice/rc-local.service"},
}
VARIANTS = [verdict for name in INIT_SYSTEMS for verdict in definition_of(name).without_guest()]
EVERY_VARIANT = pytest.mark.parametrize(
    "verdict", VARIANTS, ids=lambda verdict: f"{verdict.system} {verdict.dialect}".strip()
)


def check(verdict: InitVerdict, running: dict[str, Any]) -> str | None:
    """Return what the definition of an init system says of a running agent."""
    return definition_of(str(verdict.system)).check_supervisor(running, verdict)


@EVERY_VARIANT
def test_a_supervised_agent_is_recognised(verdict: InitVerdict) -> None:
    """Each variant accepts an agent that its own init system started."""
    running = {"pid1": "init", "cgroup": "/", **SUPERVISED[str(verdict.system), verdict.dialect]}
    assert check(verdict, running) is None


def test_a_script_that_a_link_started_is_recognised() -> None:
    """Where ``rc`` starts the links of a runlevel, the loop has the link's name."""
    for verdict in VARIANTS:
        if verdict.system == "sysv":
            parent = {"pid": 9, "comm": "S99guest-agent"}
            assert check(verdict, {"pid1": "init", "cgroup": "/", "parent": parent}) is None


@EVERY_VARIANT
def test_another_supervisor_is_named(verdict: InitVerdict) -> None:
    """Systemd accepts only its own unit, and no other init system accepts that unit."""
    running = {"pid1": "systemd", "parent": {"pid": 1, "comm": "systemd"}, "cgroup": UNIT}
    assert (check(verdict, running) is None) is (verdict.system == "systemd")
    strange = {"pid1": "systemd", "parent": {"pid": 7, "comm": "x"}, "cgroup": "/x"}
    assert (check(verdict, strange) is None) is (verdict.system == "standalone")


@pytest.mark.parametrize(
    "parent",
    ["x", ["a"], 3, True, None, {}, {"comm": 5, "pid": "1"}, {"comm": ["runsv"], "pid": True}],
)
@EVERY_VARIANT
def test_a_malformed_parent_is_refused(verdict: InitVerdict, parent: object) -> None:
    """A hostile guest may send any JSON; it never passes for the parent that is expected."""
    pid1 = SUPERVISED[str(verdict.system), verdict.dialect].get("pid1", "init")
    definition = definition_of(str(verdict.system))
    (variant,) = [each for each in definition.variants if each.dialect == verdict.dialect]
    fault = check(verdict, {"pid1": pid1, "cgroup": "/", "parent": parent})
    if variant.supervisor.in_unit:
        assert fault == "its control group is '/'"
    elif variant.supervisor.parents:
        assert fault is not None
        assert fault.startswith("its parent is ")
    else:
        assert fault is None
