"""The command line: the only package that prints and exits."""

from vmprovision.cli.app import run

__all__ = ["run"]
