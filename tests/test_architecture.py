"""Compare what the pages and docstrings say about the code with the code."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "vmprovision"
ARCHITECTURE = REPOSITORY / "docs/architecture.md"
# not part of the program on the host: what runs in a guest, and inside the appliance
ELSEWHERE = ("agent", "runtime/port", "appliance/inside")
READERS = ("inspection", "initsystem", "mounts", "guest", "selinux", "disklayout")
PASSED_ON = {"inspection/ostree.py"}  # wraps the filesystem for apply; reads through a GuestReader
# words of a sentence that says that nothing else does something
CLAIM = re.compile(r"\bonly (?:importer|writer|module|package|part|place)\b[^.;]*", re.IGNORECASE)
# those that a test below checks
CLAIMS = (
    "only part of vmprovision that imports guestfs",
    "only module that imports guestfs",
    "only importer of ``distributed``",
    "only module that imports its binding",
    "only package that prints and exits",
)


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Return the syntax tree of each module of the host's program, by its path in the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if not name.startswith(ELSEWHERE):
            found[name] = ast.parse(path.read_text("utf-8"))
    return found


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield each module that a module imports, by a statement or by its name in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and spelled(node.func).endswith("import_module"):
            yield ast.unparse(node.args[0]).strip("'")


def spelled(node: ast.expr) -> str:
    """Return a name or a name's attribute as it is written; else nothing."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def importers(module: str) -> list[str]:
    """Return the modules that import that one, or something in it."""
    return [
        name
        for name, tree in sources().items()
        if any(other == module or other.startswith(f"{module}.") for other in imported(tree))
    ]


def is_main_block(node: ast.stmt) -> bool:
    """Return whether a statement is ``if __name__ == "__main__":``."""
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


def printers() -> list[str]:
    """Return the modules that print or end the process when they are imported and called."""
    words = {"print", "sys.stdout", "sys.stderr", "sys.exit", "SystemExit"}
    found = []
    for name, tree in sources().items():
        nodes = [n for body in tree.body if not is_main_block(body) for n in ast.walk(body)]
        if words & {spelled(n) for n in nodes if isinstance(n, ast.expr)}:
            found.append(name)
    return found


def test_guestfs_is_imported_in_one_module() -> None:
    """Its errors are translated in one place, so nothing else may call it."""
    assert importers("guestfs") == ["appliance/library.py"]


def test_distributed_is_imported_in_one_module() -> None:
    """It is optional: every other module works without it."""
    assert importers("distributed") == ["batch/dask.py"]


def test_libvirt_is_imported_in_one_module() -> None:
    """Its errors are translated there, and it is looked at there whose a domain is."""
    assert importers("libvirt") == ["server/hypervisor.py"]


def test_only_the_command_line_prints_and_exits() -> None:
    """A library that prints or exits cannot be used in somebody else's program."""
    found = printers()
    others = [name for name in found if not name.startswith("cli/")]
    assert len(others) < len(found)
    assert [name for name in others if name != "__main__.py"] == []


def test_what_reads_a_guest_cannot_write_to_it() -> None:
    """The rooms that find facts never name the Protocol that has methods which write."""
    writers = importers("vmprovision.filesystem.protocol.GuestFilesystem")
    assert "changes/apply.py" in writers
    assert {name for name in writers if name.startswith(READERS)} <= PASSED_ON


def test_every_claim_is_checked() -> None:
    """A page or docstring that says "the only module that..." has a test here."""
    pages = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")]
    texts = {path: path.read_text("utf-8") for path in pages}
    texts |= {PACKAGE / name: "\n".join(docstrings(tree)) for name, tree in sources().items()}
    unchecked = [
        f"{path.relative_to(REPOSITORY)}: {claim}"
        for path, text in texts.items()
        for claim in CLAIM.findall(" ".join(text.split()))
        if not claim.lower().startswith(CLAIMS)
    ]
    assert unchecked == []


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield every docstring of a module."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def section(title: str) -> str:
    """Return the text of one section of the architecture page."""
    text = ARCHITECTURE.read_text("utf-8")
    return re.split(r"^## ", text.split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def test_the_floors_are_those_of_import_linter() -> None:
    """The table of rooms has the layers of pyproject.toml, in their order."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    layers = [sorted(layer.split(" | ")) for layer in contract["layers"]]
    rows = re.findall(r"^\| (`[^|]*`) \|", section("Floors"), re.MULTILINE)
    assert [sorted(re.findall(r"`(\w+)`", row)) for row in rows] == layers


def test_the_line_is_where_the_page_says() -> None:
    """Each step's file is there and defines the function that is named beside it."""
    steps = re.findall(r"`(\w+)` \| `([\w/]+\.py)`", section("One straight line"))
    assert steps
    for function, path in steps:
        tree = ast.parse((PACKAGE / path).read_text("utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
