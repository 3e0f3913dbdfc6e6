"""Annotations and the job summary, as GitHub's runner reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vmprovision.bake import BakeResult
from vmprovision.bake.results import Step
from vmprovision.cli.workflow import fault_commands, summary
from vmprovision.errors import BakeFileError, ProofError

if TYPE_CHECKING:
    import pytest


def test_each_fault_is_an_annotation_at_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are those of the repository; what would end a command early is escaped."""
    monkeypatch.setenv("GITHUB_WORKSPACE", "/srv/builds")
    error = BakeFileError("x", problems=[(3, "100% wrong"), (9, "a::b")])
    result = BakeResult(
        file=Path("/srv/builds/images/a,b:c.toml"), outcome="failed", error=error, line=3
    )
    assert list(fault_commands(result)) == [
        "::error file=images/a%2Cb%3Ac.toml,line=3,title=vmprovision bake::100%25 wrong",
        "::error file=images/a%2Cb%3Ac.toml,line=9,title=vmprovision bake::a::b",
    ]


def test_a_guest_cannot_write_a_command() -> None:
    """The console of a guest may hold line breaks and commands: they stay one message."""
    error = ProofError("it said\n::set-env name=PATH::x\r\n", hint="look")
    result = BakeResult(file=Path("a.toml"), outcome="failed", error=error, line=4)
    (command,) = fault_commands(result)
    assert "\n" not in command
    assert "\r" not in command
    assert command.startswith("::error file=a.toml,line=4,")


def test_the_summary_is_one_table_and_the_faults() -> None:
    """Names are shown as they are, whatever Markdown would make of them."""
    done = BakeResult(
        file=Path("a_b_c.toml"),
        outcome="baked",
        steps=(Step(name="inject", seconds=1.26), Step(name="prove", seconds=40.0)),
        seconds=50.0,
        proof=30.5,
        images=("a.qcow2", "a|b.oci"),
    )
    failed = BakeResult(
        file=Path("x.toml"), outcome="failed", error=ProofError("<b>no</b> | *"), line=7
    )
    text = summary([done, failed])
    head, rule, first, second = text.splitlines()[2:6]
    assert head.count("|") == rule.count("|")
    assert first.replace("\\|", "").count("|") == head.count("|")
    assert second.count("|") == head.count("|")
    assert "| 1.3 s |" in first
    assert "| 30.5 s after power-on |" in first
    assert "<code>a\\_b\\_c.toml</code>" in first
    assert "**x.toml:7**: &lt;b&gt;no&lt;/b&gt; \\| \\*" in text
