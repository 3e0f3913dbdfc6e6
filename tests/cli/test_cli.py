"""The command line as a user meets it: help, JSON, errors and exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer

import vmprovision
from tests.trees import OS_RELEASE, SYSTEMD_TREE, Tree, elf, make_tree
from vmprovision import errors
from vmprovision.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import RunCli

DOCS = Path(__file__).parents[2] / "docs"


def commands(
    group: Any,  # noqa: ANN401 -- Typer brings a Click of its own
    *words: str,
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Return every command below a group: its words, and its Click command."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *words, name)
        else:
            yield (*words, name), command


def test_every_error_has_an_exit_code_and_the_table_says_it() -> None:
    """docs/exit-codes.md and the program agree, class by class."""
    text = (DOCS / "exit-codes.md").read_text()
    table = dict(re.findall(r"^\| (\d+) \| `(\w+)` \|", text, re.MULTILINE))
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and issubclass(kind, errors.VmprovisionError)
        and kind is not errors.VmprovisionError
    ]
    assert table == {str(kind.exit_code): kind.__name__ for kind in kinds}
    assert len({kind.exit_code for kind in kinds}) == len(kinds)


def test_every_command_explains_itself(run_cli: RunCli) -> None:
    """Each command and each of its options has a help text."""
    for words, command in commands(typer.main.get_command(app)):
        assert command.help, words
        options = [p for p in command.params if p.param_type_name == "option"]
        assert all(option.help for option in options), words
        assert "--json" in [name for option in options for name in option.opts], words
        valued = [option for option in options if not (option.is_flag or option.count)]
        assert all(each.metavar for each in valued), f"{words}: Typer would show a Python type"
    text = run_cli("inject", "--help").stdout
    assert "Usage" in text
    assert re.findall("(?<=─ )[A-Z][a-z ]+(?= ─)", text)[1:] == [
        "Options",
        "Agent",
        "Several images",
        "Image",
    ]
    assert not re.search("--(json|dry-run|help).*<bool>", text)


def test_json_is_one_object_and_nothing_else(run_cli: RunCli, tmp_path: Path) -> None:
    """Progress and logs are never mixed into standard output."""
    tree = make_tree(tmp_path, SYSTEMD_TREE)
    for words in (
        ("inspect", tree),
        ("plan", tree),
        ("inject", tree, "--vm-id", "a"),
        ("inject", tree, "--dry-run"),
        ("verify", tree),
        ("remove", tree),
        ("render", "systemd"),
        ("image", "list"),
    ):
        done = run_cli("-vv", *words, "--json")
        assert isinstance(json.loads(done.stdout), dict), words
        assert done.stdout.count("\n") == 1


def test_inspect_says_what_the_documentation_promises(run_cli: RunCli, tmp_path: Path) -> None:
    """The report has the documented keys, and its evidence is in sentences."""
    tree = make_tree(tmp_path, SYSTEMD_TREE)
    found = json.loads(run_cli("inspect", tree, "--json").stdout)
    assert found["distro"] == "debian"
    assert found["product_name"] == "Debian GNU/Linux 12 (bookworm)"
    assert found["version"] == "12"
    assert found["arch"] == "x86_64"
    assert found["init"]["system"] == "systemd"
    assert found["init"]["confidence"] == "certain"
    assert all(" " in sentence for sentence in found["init"]["evidence"])
    assert found["interpreters"][0]["version"] == "3.11"
    assert found["selinux"] is None
    assert found["agent"] is None
    run_cli("inject", tree, "--vm-id", "a", "--manager-url", "http://192.0.2.1")
    agent = json.loads(run_cli("inspect", tree, "--json").stdout)["agent"]
    assert (agent["vm_id"], agent["manager_url"]) == ("a", "http://192.0.2.1")


def test_a_dry_run_is_the_plan_and_writes_nothing(run_cli: RunCli, tmp_path: Path) -> None:
    """Inject --dry-run and plan print the same."""
    tree = make_tree(tmp_path, SYSTEMD_TREE)
    before = sorted(tree.rglob("*"))
    planned = run_cli("plan", tree, "--port", "81", "--json").stdout
    assert run_cli("inject", tree, "--port", "81", "--dry-run", "--json").stdout == planned
    assert sorted(tree.rglob("*")) == before
    operations = json.loads(planned)["operations"]
    assert operations[-1]["operation"] == "Symlink"
    assert not operations[-1]["satisfied"]


def test_a_token_comes_from_a_file_and_is_never_printed(run_cli: RunCli, tmp_path: Path) -> None:
    """A token is in no report and no log, and only root can read it in the guest."""
    tree = make_tree(tmp_path / "tree", SYSTEMD_TREE)
    token = tmp_path / "token"
    token.write_text("abcdef0123456789\n")
    done = run_cli("-vv", "inject", tree, "--token-file", token, "--json")
    assert "abcdef0123456789" not in done.stdout + done.stderr
    configuration = tree / "etc/guest-agent.conf"
    assert "TOKEN=abcdef0123456789\n" in configuration.read_text()
    assert configuration.stat().st_mode & 0o7777 == 0o600


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["inspect", "{}/none.qcow2"], 11, "none.qcow2"),
        (["inject", "{}/none.qcow2"], 11, "none.qcow2"),
        (["inject", "{}/empty"], 31, "root filesystem"),
        (["inject", "{}/tree", "--init", "launchd"], 40, "launchd"),
        (["inject", "{}/tree", "--vm-id", "a b"], 40, "VM id"),
        (["inject", "{}/tree", "--token-file", "{}/none"], 40, "token file"),
        (["inject", "{}/tree", "--output", "{}/new"], 40, "directory"),
        (["verify", "{}/tree"], 40, "no injected agent"),
        (["remove", "{}/tree"], 40, "no injected agent"),
        (["inject", "{}/odd"], 33, "--init"),
        (["render", "launchd"], 40, "launchd"),
        (["image", "build", "none"], 80, "none"),
        (["inject"], 2, "IMAGE"),
        (["inject", "{}/tree", "--port", "x"], 2, "port"),
    ],
)
def test_bad_input_is_one_clear_error(
    run_cli: RunCli, tmp_path: Path, words: list[str], code: int, says: str
) -> None:
    """The documented exit code, a message that names the cause, and no traceback."""
    (tmp_path / "empty").mkdir()
    make_tree(tmp_path / "tree", SYSTEMD_TREE)
    odd: Tree = {"/etc/os-release": OS_RELEASE, "/sbin/init": elf()}
    make_tree(tmp_path / "odd", odd)
    arguments = [word.format(tmp_path) for word in words]
    done = run_cli(*arguments, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    if code == 2:  # the usage of the program itself
        return
    error = json.loads(run_cli(*arguments, "--json", check=False).stdout)
    assert error["exit_code"] == code
    assert says in error["error"]["message"] + error["error"]["hint"]


def test_verify_ends_with_its_code_where_something_differs(run_cli: RunCli, tmp_path: Path) -> None:
    """The exit code is 60, and each mismatch has its own line."""
    tree = make_tree(tmp_path, SYSTEMD_TREE)
    run_cli("inject", tree)
    (tree / "usr/local/bin/guest-agent").chmod(0o700)
    done = run_cli("verify", tree, check=False)
    assert done.returncode == 60
    assert "differs  /usr/local/bin/guest-agent: mode 0700, should be 0755" in done.stdout


def test_hostile_text_of_a_guest_is_shown_as_text(run_cli: RunCli, tmp_path: Path) -> None:
    """No report or error passes a guest's escape sequence to the terminal."""
    tree: Tree = {**SYSTEMD_TREE, "/etc/os-release": 'ID=x\nPRETTY_NAME="\x1b]0;owned\x07"\n'}
    make_tree(tmp_path, tree)
    for words in (("inspect",), ("inject",), ("inspect", "--json")):
        done = run_cli(words[0], tmp_path, *words[1:])
        assert "\x1b" not in done.stdout + done.stderr
        assert "owned" in done.stdout


def test_names_with_colons_stay_as_they_are(run_cli: RunCli, tmp_path: Path) -> None:
    """A report or an error makes no emoji of them."""
    tree = make_tree(tmp_path / ":warning:", SYSTEMD_TREE)
    assert ":warning:" in run_cli("inject", tree).stdout
    assert ":skull:" in run_cli("inspect", tmp_path / ":skull:", check=False).stderr


def test_the_public_names_are_the_documented_ones() -> None:
    """Every name in ``__all__`` exists and is documented, and the list is sorted."""
    names = [name for name in vmprovision.__all__ if name != "__version__"]
    assert names == sorted(names)
    text = (DOCS / "library.md").read_text()
    for name in names:
        assert getattr(vmprovision, name).__doc__
        assert f"`{name}`" in text, name


def test_shell_completion_is_offered(run_cli: RunCli) -> None:
    """The shell gets a script that completes commands."""
    # otherwise Typer looks for a shell among its parent processes, and CI has none
    environment = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = run_cli("--show-completion", "bash", env=environment).stdout
    assert "COMPLETE=complete_bash" in script
    assert "complete -o default" in script


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    """The orchestrator in docs/library.md injects the images that it is given."""
    text = (DOCS / "library.md").read_text()
    (code,) = re.findall(r"```python\n# orchestrator\.py\n(.*?)```", text, re.DOTALL)
    script = tmp_path / "orchestrator.py"
    script.write_text(code)
    trees = [make_tree(tmp_path / name, SYSTEMD_TREE) for name in ("vm-1", "vm-2")]

    done = subprocess.run(
        [sys.executable, script, *map(str, trees)],
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    )
    assert "vm-1" in done.stdout
    assert "vm-2" in done.stdout
    for tree in trees:
        assert f"VM_ID={tree.name}\n" in (tree / "etc/guest-agent.conf").read_text()
