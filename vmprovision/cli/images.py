"""``vmprovision image``: guest images from recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmprovision.cli.commands import App
from vmprovision.cli.console import STDOUT
from vmprovision.cli.options import JsonOption
from vmprovision.cli.running import present, work

if TYPE_CHECKING:
    from vmprovision import Control
    from vmprovision.recipe import Recipe

app = App(help="Small bootable guest images, built from recipes.")

RecipesOption = Annotated[
    Path | None,
    typer.Option("--recipes", metavar="DIR", help="Your own recipes, one folder for each."),
]


@app.command("list")
def list_(*, recipes_in: RecipesOption = None, as_json: JsonOption = False) -> None:
    """List the recipes."""

    def listed(_: Control) -> list[Recipe]:
        from vmprovision.recipe import list_recipes

        return list_recipes(recipes_in)

    recipes = work(listed, as_json=as_json)
    present(
        {"recipes": [{"name": r.name, "description": r.description} for r in recipes]},
        lambda: STDOUT.print("\n".join(f"{r.name:<24} {r.description}" for r in recipes)),
        as_json=as_json,
    )


@app.command("build")
def build(  # noqa: PLR0913 -- one parameter for each option
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe, as list names it.")],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Also write a copy here."),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Build the image even if the cache has it.")
    ] = False,
    tarball: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The root filesystem that the recipe names, or the folder that holds it.",
        ),
    ] = None,
    recipes_in: RecipesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build a small bootable image from a recipe, without mounts; later take it from the cache."""

    def built(control: Control) -> Path:
        from vmprovision.recipe import build_image

        return build_image(
            name,
            output=output,
            refresh=refresh,
            control=control,
            recipes=recipes_in,
            tarball=tarball,
        )

    path = work(built, as_json=as_json)
    present({"name": name, "path": str(path)}, lambda: STDOUT.print(str(path)), as_json=as_json)
