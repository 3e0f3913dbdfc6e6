"""Build the documentation site from docs/, with Sphinx; any warning of it is an error.

``python -m release.site FOLDER`` writes the site.  The pages of docs/ are taken as they are.
The commands, the keys of a bake file and the agent's command are the manual pages, as Markdown
by mandoc(1).  The API is the public names of the package, with their docstrings.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from release import manual

DOCS = Path(__file__).resolve().parents[1] / "docs"
# The site's contents: patterns of the pages of docs/, and of those that are made here.
NAVIGATION = {
    "Begin": ("tour", "installing"),
    "How to": ("howto/*", "ci", "bake", "images", "batches", "storage", "seed", "serve"),
    "Reference": (
        *("reference/*", "exit-codes", "agent", "library", "support-matrix", "performance"),
    ),
    "Explanation": ("architecture", "safety", "SECURITY", "adding-an-init-system"),
    "Decisions": ("decisions/*",),
}
API = """# API

What `import vmprovision` offers. [vmprovision as a library](../library.md) shows its use.

```{eval-rst}
.. automodule:: vmprovision
   :members:
```
"""
SETTINGS: dict[str, Any] = {
    "project": "vmprovision",
    "extensions": [
        "myst_parser",
        "sphinx.ext.autodoc",
        "sphinx.ext.napoleon",
        "sphinxcontrib.mermaid",
    ],
    "html_theme": "furo",
    "html_title": "vmprovision",
    "html_copy_source": False,
    "html_show_copyright": False,
    "autodoc_typehints": "description",
    "autodoc_typehints_description_target": "documented",
    "autodoc_class_signature": "separated",
    "myst_fence_as_directive": ["mermaid"],
    "myst_heading_anchors": 6,  # anchors of headings, as forges make them
}
HEADING = re.compile(r"^#", re.MULTILINE)


def main(folder: Path, docs: Path = DOCS) -> bool:
    """Build the site in a folder; return whether Sphinx found nothing to warn of.

    Args:
        folder: gets ``html`` with the site; ``source`` and ``doctrees`` are what it is made from.
        docs: the pages.
    """
    from sphinx.application import Sphinx  # noqa: PLC0415 -- only the extra `site` brings it

    shutil.rmtree(folder, ignore_errors=True)
    source = folder / "source"
    shutil.copytree(docs, source)
    _add_pages(source)
    site = Sphinx(
        source,
        None,
        folder / "html",
        folder / "doctrees",
        "html",
        confoverrides=SETTINGS,
        status=None,
        warningiserror=True,
    )
    site.build()
    return bool(site.statuscode == 0)


def _add_pages(source: Path) -> None:
    """Add the contents to the first page, and the pages of the reference."""
    contents = ""
    for title, pages in NAVIGATION.items():
        lines = ("```{toctree}", ":hidden:", ":glob:", f":caption: {title}", *pages, "```")
        contents += "\n" + "\n".join(lines) + "\n"
    with (source / "index.md").open("a", encoding="utf-8") as index:
        index.write(contents)
    reference = source / "reference"
    manual.main(reference)
    for page in reference.glob("*.[1-8]"):
        page.with_name(f"{page.name}.md").write_text(_as_markdown(page), encoding="utf-8")
    (reference / "api.md").write_text(API, encoding="utf-8")


def _as_markdown(page: Path) -> str:
    """Return a manual page as Markdown, below a heading of its own."""
    command = ["mandoc", "-T", "markdown", str(page)]
    text = subprocess.run(  # noqa: S603 -- of this host
        command, capture_output=True, check=True, text=True
    ).stdout
    _, *body, _ = text.splitlines()  # without the header and footer of a terminal
    return f"# {page.stem}({page.suffix[1:]})\n" + HEADING.sub("##", "\n".join(body)) + "\n"


if __name__ == "__main__":
    sys.exit(0 if main(Path(sys.argv[1])) else 1)
