"""``vmprovision appliance``: the saved appliances of this host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmprovision.cli.commands import App
from vmprovision.cli.console import STDOUT
from vmprovision.cli.options import JsonOption
from vmprovision.cli.running import present, work

if TYPE_CHECKING:
    from vmprovision import Control
    from vmprovision.appliance.snapshot.store import SavedAppliance

app = App(
    help="The appliance that is booted once on this host and restored for every image.",
)


@app.command("build")
def build(*, as_json: JsonOption = False) -> None:
    """Boot the appliance and save it now, replacing the saved one if there is one.

    The first command that opens an image does the same by itself, if there is none.
    """
    from vmprovision.cli.text import show_appliance

    def built(control: Control) -> SavedAppliance:
        from vmprovision.appliance.snapshot.host import build_host_appliance

        return build_host_appliance(control)

    saved = work(built, as_json=as_json)
    present(saved.as_json(), lambda: show_appliance(STDOUT, saved), as_json=as_json)


@app.command("status")
def status(*, as_json: JsonOption = False) -> None:
    """Say whether there is a saved appliance that fits this host, where, and how large it is."""
    from vmprovision.cli.text import show_appliance

    def found(_: Control) -> SavedAppliance | None:
        from vmprovision.appliance.snapshot.host import find_host_appliance

        return find_host_appliance()

    saved = work(found, as_json=as_json)
    present(
        {"saved": saved.as_json() if saved else None},
        lambda: show_appliance(STDOUT, saved),
        as_json=as_json,
    )


@app.command("clear")
def clear(*, as_json: JsonOption = False) -> None:
    """Remove all saved appliances of this user; the next command that needs one saves it again."""

    def cleared(_: Control) -> int:
        from vmprovision.appliance.snapshot.store import clear_saved

        return clear_saved()

    count = work(cleared, as_json=as_json)
    present(
        {"removed": count},
        lambda: STDOUT.print(f"{count} saved appliances removed"),
        as_json=as_json,
    )
