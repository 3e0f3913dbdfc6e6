"""Write the manual pages and shell completions, from the same source as ``--help``.

``python -m release.manual FOLDER`` writes vmprovision(1) from the commands and the
classes of errors, vmprovision-bake(5) from the JSON schema of bake files, guest-agent(8)
from the agent's usage and the table of its settings, and completions for three shells.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import completion
from typer.main import get_command

from release.mdoc import Page, word
from vmprovision import errors
from vmprovision.agent.main import USAGE
from vmprovision.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator

Described = Any  # a command, option or argument: Typer's classes differ between its versions
Document = dict[str, Any]
Item = tuple[tuple[str, ...], str]  # macros and words, and a text
REPOSITORY = Path(__file__).resolve().parents[1]
SHELLS = {"bash": "vmprovision.bash", "zsh": "_vmprovision", "fish": "vmprovision.fish"}
FORMATTED = re.compile(r"\[/?[a-z]+\]")  # rich's markup in a help text
ROW = re.compile(r"^\| `([A-Z_`, ]+)` \|([^|]*)\|([^|]*)\|$", re.MULTILINE)
SEE_BELOW = re.compile(r", \[see below\]\([^)]*\)")
SUMMARY = "install a guest agent offline in Linux disk images"
ENVIRONMENT = (
    ("VMPROVISION_CACHE", "The folder of the cache, if not ~/.cache/vmprovision."),
    ("VMPROVISION_STATE", "The folder of the key that seals redo logs."),
    ("VMPROVISION_STOCK_APPLIANCE", "If it is 1, boot libguestfs's own appliance each time."),
    ("SUPERMIN_KERNEL", "The kernel of the appliance, if not the host's newest one."),
    ("SSL_CERT_FILE, https_proxy", "For the downloads of bake."),
)
FILES = (
    ("~/.cache/vmprovision", "Saved appliances, runtimes, built images and finished bakes."),
    ("~/.local/state/vmprovision/redo-log.key", "The key that seals this user's redo logs."),
    ("IMAGE.vmprovision-*", "The redo log of an image; recover completes or discards it."),
)
EXAMPLE = """
$ vmprovision image build debian-12-systemd -o disk.qcow2
$ vmprovision inject disk.qcow2 --vm-id web-1
$ vmprovision prove disk.qcow2
"""
BAKE_EXAMPLE = """
[source]
image = "debian-12.qcow2"
url = "https://example.org/debian-12.qcow2"
sha256 = "..."

[agent]
manager_url = "http://192.0.2.1:3000"

[prove]
timeout = 300

[[output]]
format = "qcow2"
compress = true
"""
AGENT_FILES = (
    ("/etc/guest-agent.conf", "The settings."),
    ("/usr/local/bin/guest-agent", "The agent."),
    ("/usr/local/lib/guest-agent", "What an injection or install keeps: receipt, runtime, copies."),
)


def main(folder: Path) -> None:
    """Write all pages and completions into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    date = _date()
    pages = {
        "vmprovision.1": program_page(date),
        "vmprovision-bake.5": bake_page(date),
        "guest-agent.8": agent_page(date),
    }
    for name, page in pages.items():
        (folder / name).write_text(str(page), encoding="utf-8")
    for shell, name in SHELLS.items():
        (folder / name).write_text(_completion(shell), encoding="utf-8")


def _completion(shell: str) -> str:
    """Return what completes the program's words in a shell, as ``--show-completion`` prints it."""
    script: str = completion.get_completion_script(  # type: ignore[attr-defined] # re-exported
        prog_name="vmprovision", complete_var="_VMPROVISION_COMPLETE", shell=shell
    )
    return script.rstrip("\n") + "\n"


def _date() -> str:
    """Return the date of the source, as reproducible builds set it; else of today."""
    day = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    return time.strftime("%B ", day) + f"{day.tm_mday}, {day.tm_year}"


def program_page(date: str) -> Page:
    """Return vmprovision(1)."""
    page = Page("vmprovision", 1, SUMMARY, date)
    root = get_command(app)
    commands = list(_commands(root, ()))
    page.section("SYNOPSIS")
    for number, (words, command) in enumerate(commands):
        page.macro("Nm", *(["vmprovision"] if number == 0 else []))
        page.macro("Cm", *map(word, words))
        page.macro("Op", "Ar", "option", "...")
        for each in _arguments(command):
            optional = () if each.required else ("Op",)
            several = ("...",) if each.nargs < 0 else ()
            page.macro(*optional, "Ar", word(_metavar(each)), *several)
    page.section("DESCRIPTION")
    page.text(_help(root))
    page.text(
        "An image is a raw, qcow2, VMDK, VDI or VHDX file, or a directory with an unpacked "
        "root filesystem."
    )
    page.items(_options(root))
    for words, command in commands:
        page.subsection(" ".join(words))
        page.text(_help(command))
        page.items([*_argument_items(command), *_options(command)])
    page.section("ENVIRONMENT")
    page.items((("Ev", word(name)), text) for name, text in ENVIRONMENT)
    page.section("FILES")
    page.items((("Pa", word(path)), text) for path, text in FILES)
    page.section("EXIT STATUS")
    page.text("0 means done, or nothing to do. Every other code is one cause:")
    page.items(_exit_codes())
    page.section("EXAMPLES")
    page.example(EXAMPLE)
    page.section("SEE ALSO")
    page.macro("Xr", "qemu-img", "1", ",")
    page.macro("Xr", "vmprovision-bake", "5", ",")
    page.macro("Xr", "guest-agent", "8")
    return page


def _commands(
    command: Described, words: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Described]]:
    """Yield each command that does something, with the words that lead to it."""
    for name, child in getattr(command, "commands", {}).items():
        if getattr(child, "commands", None):
            yield from _commands(child, (*words, name))
        else:
            yield (*words, name), child


def _help(command: Described) -> str:
    return FORMATTED.sub("", inspect.cleandoc(command.help or ""))


def _arguments(command: Described) -> list[Described]:
    return [each for each in command.params if each.param_type_name == "argument"]


def _argument_items(command: Described) -> Iterator[Item]:
    for each in _arguments(command):
        yield ("Ar", word(_metavar(each))), each.help or ""


def _options(command: Described) -> Iterator[Item]:
    """Yield an item for each option: its names, its value, and its help."""
    for each in command.params:
        if each.param_type_name != "option" or each.hidden:
            continue
        words: list[str] = []
        for name in (*each.opts, *each.secondary_opts):
            words += [*([","] if words else []), "Fl", word(name[1:])]
        if not (each.is_flag or each.count):
            words += ["Ar", word(_metavar(each))]
        yield tuple(words), each.help or ""


def _metavar(parameter: Described) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _exit_codes() -> list[Item]:
    """Return each exit code with its cause, as the classes of errors have them."""
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass)]
    causes = {
        each.exit_code: inspect.cleandoc(each.__doc__ or "").partition("\n\n")[0]
        for each in classes
        if issubclass(each, errors.VmprovisionError) and "exit_code" in vars(each)
    }
    causes[1] = "An unexpected fault of vmprovision; from doctor, something needed is missing."
    causes[2] = "Wrong use of the command line."
    causes[3] = "At least one of several images failed."
    causes[4] = "From bake --check: an output would change."
    return [((str(code),), causes[code]) for code in sorted(causes)]


def bake_page(date: str) -> Page:
    """Return vmprovision-bake(5), from the JSON schema that editors get."""
    schema = json.loads((REPOSITORY / "docs/bake.schema.json").read_text("utf-8"))
    page = Page("vmprovision-bake", 5, "how a golden image is made", date)
    page.section("DESCRIPTION")
    page.text(
        "A bake file is TOML. vmprovision bake makes a golden image as it says. Unknown "
        "keys are refused, and no value is converted."
    )
    for name, table in schema["properties"].items():
        is_list = table.get("type") == "array"
        page.subsection(f"Tables {name}" if is_list else f"Table {name}")
        definition = schema["$defs"][_referenced(table)]
        page.text(table.get("description") or definition["description"])
        page.items(_keys(definition))
    page.section("EXAMPLES")
    page.example(BAKE_EXAMPLE)
    page.section("SEE ALSO")
    page.macro("Xr", "vmprovision", "1")
    return page


def _referenced(table: Document) -> str:
    """Return the name of the definition that a property refers to, however it does."""
    found = re.search(r'"#/\$defs/(\w+)"', json.dumps(table))
    assert found is not None  # noqa: S101 -- a table of the schema that is none
    return found[1]


def _keys(definition: Document) -> Iterator[Item]:
    for key, facts in definition["properties"].items():
        text = facts.get("description", "")
        choices = [
            each for part in (facts, *facts.get("anyOf", ())) for each in part.get("enum", ())
        ]
        if choices:
            text += " One of: " + ", ".join(choices) + "."
        if facts.get("default") not in (None, False):
            text += f" Default: {facts['default']}."
        if key in definition.get("required", ()):
            text += " Required."
        yield ("Cm", word(key)), text


def agent_page(date: str) -> Page:
    """Return guest-agent(8), from the agent's usage and the table of its settings."""
    page = Page("guest-agent", 8, "answer for a guest, and report its address", date)
    synopsis, _, rest = USAGE.partition("\n\n")
    description, _, listed = rest.partition("\n\n")
    page.section("SYNOPSIS")
    for number, line in enumerate(synopsis.removeprefix("usage:").splitlines()):
        page.macro("Nm", *(["guest-agent"] if number == 0 else []))
        words = line.split()[1:]
        page.macro("Ar", *map(word, words))
    page.section("DESCRIPTION")
    page.text(description)
    page.items(_usage_items(listed))
    page.section("CONFIGURATION")
    page.text("The settings are lines of KEY=VALUE.")
    text = (REPOSITORY / "docs/agent.md").read_text("utf-8").split("\n## Configuration\n")[1]
    page.items(
        (("Ev", word(keys.replace("`", ""))), _setting(meaning.strip(), default.strip()))
        for keys, default, meaning in ROW.findall(text.split("\n## ")[0])
    )
    page.section("FILES")
    page.items((("Pa", word(path)), text) for path, text in AGENT_FILES)
    page.section("EXIT STATUS")
    page.text(
        "0 after a clean stop, 1 if it cannot listen or check finds a fault, 2 for wrong arguments."
    )
    page.section("SEE ALSO")
    page.macro("Xr", "vmprovision", "1")
    return page


def _setting(meaning: str, default: str) -> str:
    """Return the text of a setting; a link to another place of the page is left out."""
    return f"{meaning} (default: {SEE_BELOW.sub('', default)})"


def _usage_items(listed: str) -> Iterator[Item]:
    """Yield an item for each word and option of the agent's usage."""
    for entry in re.split(r"\n(?=  \S)", listed.rstrip("\n")):
        head, _, text = entry.strip().partition("  ")
        name, *values = head.split()
        if name.startswith("-"):
            words = ["Fl", word(name.rstrip(",")[1:])]
            for value in values:
                words += [",", "Fl", word(value[1:])] if value[0] == "-" else ["Ar", word(value)]
        else:
            words = ["Cm", word(name)]
        yield tuple(words), " ".join(text.split()) or "Print the version, or this text, and end."


if __name__ == "__main__":
    main(Path(sys.argv[1]))
