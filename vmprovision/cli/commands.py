"""Typer's classes, with flags that have no type in the help: ``--json``, not ``--json <bool>``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from collections.abc import Callable


def _without_types(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


class Command(TyperCommand):
    """A command whose flags have no type in its help."""

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401 -- Click's, or Typer's copy of it
        """Return the parameters, as Click does."""
        return _without_types(super().get_params(ctx))


class Group(TyperGroup):
    """The same for a group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401 -- as above
        """Return the parameters, as Click does."""
        return _without_types(super().get_params(ctx))


class App(typer.Typer):
    """An application of these commands."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 -- Typer's own
        """Begin with no command, and show the help if none is given."""
        super().__init__(cls=Group, no_args_is_help=True, **options)

    def command(  # type: ignore[override] # only what the program uses
        self, name: str | None = None
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Return a decorator that adds a command."""
        return super().command(name, cls=Command)
