"""The rules of file_contexts(5): which one decides, compared with libselinux."""

from __future__ import annotations

import contextlib
import random
import re
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.selinux.libselinux import MODES, LibSELinux
from vmprovision.changes.receipt import (
    AGENT,
    CONFIGURATION,
    LOGS,
    RECEIPT,
    SET_ASIDE,
)
from vmprovision.guest.facts import INIT_SYSTEMS
from vmprovision.inspection.layout import DIRECTORIES
from vmprovision.planning.injection import render_service
from vmprovision.selinux.filecontexts import FileContexts, FileContextsError, parse_file_contexts
from vmprovision.selinux.pathpattern import PatternError

if TYPE_CHECKING:
    from collections.abc import Iterator

P = PurePosixPath
RULES = """\
# comment
/.*\tsystem_u:object_r:default_t:s0
/usr(/.*)?  system_u:object_r:usr_t:s0
/usr/bin/.*\t--\tsystem_u:object_r:bin_t:s0
/usr/bin/agent\t-l\tsystem_u:object_r:link_t:s0

/usr/bin/a\\.out\tsystem_u:object_r:exact_t:s0
/usr/bin/a.*\tsystem_u:object_r:later_t:s0
/usr/bin\t-d\tsystem_u:object_r:dir_t:s0
/dev/sda\t-b\tsystem_u:object_r:disk_t:s0
/tmp/.*\t<<none>>
"""


@pytest.mark.parametrize(
    ("path", "kind", "label"),
    [
        ("/usr/bin/tool", "file", "bin_t"),
        ("/usr/bin/tool", "symlink", "usr_t"),
        ("/usr/bin/agent", "symlink", "link_t"),
        ("/usr/bin/agent", "file", "later_t"),
        ("/usr/bin/a.out", "file", "exact_t"),
        ("/usr/bin/abc", "directory", "later_t"),
        ("/usr/bin", "directory", "dir_t"),
        ("/usr/bin", "file", "usr_t"),
        ("/usrlocal", "file", "default_t"),
        ("/dev/sda", "file", "default_t"),
        ("/tmp/x", "file", None),  # noqa: S108 -- a guest's
        ("/alias/bin/tool", "file", "bin_t"),
        ("/alias", "directory", "usr_t"),
        ("/twice/tool", "file", "bin_t"),
        ("/aliased", "file", "default_t"),
        ("/here/usr/bin/tool", "file", "bin_t"),
    ],
)
def test_the_rule_that_decides(path: str, kind: str, label: str | None) -> None:
    """Exact paths first, then the last pattern; kinds count; aliases are replaced before."""
    contexts = parse_file_contexts(
        [RULES],
        local="/twice /alias/bin\n",
        distribution="# none\n/alias /wrong\n/alias /usr\n/here /\n",
    )
    found = contexts.label_for(P(path), kind)  # type: ignore[arg-type]  # one of the three
    assert found == (f"system_u:object_r:{label}:s0" if label else None)


def test_local_rules_come_last_but_exact_paths_win() -> None:
    """An administrator's rule beats every earlier pattern, but not an exact path."""
    contexts = parse_file_contexts(
        ["/a/.*\tu:r:first_t\n/a/exact\tu:r:exact_t\n", "/a/.*\tu:r:home_t\n", "/a/.*\tu:r:own_t\n"]
    )
    assert contexts.label_for(P("/a/x"), "file") == "u:r:own_t"
    assert contexts.label_for(P("/a/exact"), "file") == "u:r:exact_t"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/usr\n",
        "/usr\t-x\tu:r:t\n",
        "/usr\t--\tnolabel\n",
        "/usr\tu:r:\x1b[2J\n",
        f"/usr\tu:r:{'t' * 2000}\n",
    ],
)
def test_damaged_rules_are_an_error(text: str) -> None:
    """A line that cannot be a rule spoils them all, as it does for libselinux."""
    with pytest.raises(FileContextsError):
        parse_file_contexts([text])


# --- against libselinux, with rules made by chance ---

NAMES = st.sampled_from(["a", "b", "ab", r"a\.b", ".*", "[^/]*", "a?", "(a|b)", "[ab]+", "a(/.*)?"])
PATHS = st.lists(st.sampled_from(["a", "b", "ab", "a.b", "axb"]), min_size=1, max_size=4).map(
    lambda parts: "/" + "/".join(parts)
)
LABELS = st.integers(0, 99).map("u:r:t{}".format) | st.just("<<none>>")
LINES = st.tuples(
    st.lists(NAMES, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts)),
    st.sampled_from(["", "", "--", "-d", "-l", "-s"]),
    LABELS,
).map("\t".join)
FILES = st.lists(LINES, max_size=12).map(lambda lines: "\n".join(["/ u:r:root", *lines, ""]))
SUBSTITUTIONS = st.lists(
    st.tuples(PATHS, PATHS | st.just("/")).map(" ".join),
    max_size=3,
    unique_by=lambda s: s.split()[0],
).map(lambda lines: "\n".join(lines) + "\n")


@settings(max_examples=300, deadline=None)
@given(FILES, FILES, SUBSTITUTIONS, SUBSTITUTIONS, st.lists(PATHS, min_size=1, max_size=10))
def test_libselinux_agrees(
    rules: str, own: str, local: str, distribution: str, paths: list[str]
) -> None:
    """For any rules, the label is the one that libselinux gives."""
    contexts = parse_file_contexts([rules, "", own], local=local, distribution=distribution)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "file_contexts"
        base.write_text(rules)
        base.with_suffix(".local").write_text(own)
        base.with_suffix(".subs").write_text(local)
        base.with_suffix(".subs_dist").write_text(distribution)
        real = LibSELinux(base)
        try:
            for path in paths:
                for kind in MODES:
                    assert contexts.label_for(P(path), kind) == real.label_for(path, kind)
        finally:
            real.close()


# --- and with a real policy ---


@pytest.fixture(scope="module")
def contexts(policy_files: dict[str, bytes]) -> FileContexts:
    """Return Debian's policy as we read it."""
    texts = {PurePosixPath(path).name: text.decode() for path, text in policy_files.items()}
    return parse_file_contexts(
        [texts["file_contexts"], texts["file_contexts.homedirs"]],
        distribution=texts["file_contexts.subs_dist"],
    )


def planned_paths() -> Iterator[str]:
    """Return every path that a plan may make, with all that is above it."""
    paths = [AGENT, CONFIGURATION, RECEIPT, SET_ASIDE / ("0" * 64), *LOGS, *map(P, DIRECTORIES)]
    for init in INIT_SYSTEMS:
        paths += [operation.path for operation, _ in render_service(init)]
    parents = [parent for path in paths for parent in path.parents]
    yield from {str(path) for path in [*paths, *parents]}


def example_of(pattern: str, chance: random.Random) -> str | None:
    """Return a path that the pattern probably matches, or None if it is too odd for that."""
    text = re.sub(r"\[\^/\][*+]|\.[*+]", lambda _: chance.choice(["", "x", "a/b", ".so"]), pattern)
    text = re.sub(r"\[(.)[^]]*\]", r"\1", text)
    for _ in range(3):
        text = re.sub(r"\(([^()|]*)(\|[^()]*)?\)(\?)?", lambda m: m[1], text)
    text = re.sub(r"/+", "/", re.sub(r"[?*+]|\\", "", text))
    return str(P(text)) if re.fullmatch(r"/[^]\[(){}|^$]*", text) else None


def test_every_path_that_we_write_gets_its_label_of_a_real_policy(
    contexts: FileContexts, real_rules: LibSELinux
) -> None:
    """As a file, as a directory and as a link, the label is the one that libselinux gives."""
    paths = sorted(planned_paths())
    assert len(paths) > 80
    for path in paths:
        for kind in MODES:
            found = contexts.label_for(P(path), kind)
            assert found == real_rules.label_for(path, kind), (path, kind)
            assert found, path


def test_paths_of_a_real_policy_get_their_labels(
    contexts: FileContexts, real_rules: LibSELinux
) -> None:
    """A thousand rules are tried, each by a path that it is made for."""
    chance = random.Random(7)
    rules = chance.sample(contexts.rules, 1000)
    paths = {example_of(rule.pattern, chance) for rule in rules} - {None}
    assert len(paths) > 900
    for path in filter(None, sorted(filter(None, paths))):
        for kind in MODES:
            found = contexts.label_for(P(path), kind)
            assert found == real_rules.label_for(path, kind), (path, kind)


@pytest.mark.parametrize(
    "line",
    [
        "/x " + "a:" * 500,
        "/x " + ":".join("a" * 500) + "\x7f",
        "/(" + "|" * 4000 + "){9} a:b:c",
        "/(.?" + "|" * 3900 + "){9999} a:b:c",
        "/((((((.*)*)*)*)*)*)* a:b:c",
    ],
)
def test_rules_that_are_made_to_take_long_do_not(line: str) -> None:
    """Labels and patterns are matched in one way only, and the steps are counted."""
    began = time.thread_time()
    with contextlib.suppress(FileContextsError, PatternError):
        parse_file_contexts([line]).label_for(PurePosixPath("/" + "x" * 2000), "file")
    assert time.thread_time() - began < 5
