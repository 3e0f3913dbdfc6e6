"""The os module as CPython has it, as far as the agent needs it."""

# ruff: noqa: F401, I001 -- what is imported is the module, and what comes later replaces

from uos import *
from posix import *
from posix import _exit

from _guest import environment as _environment


def __getattr__(name):
    if name == "environ":
        return _environment()
    raise AttributeError(name)
