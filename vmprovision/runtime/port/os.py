"""The os module as CPython has it, as far as the agent needs it."""

from posix import *

from _guest import environment
from uos import *


def __getattr__(name):
    if name == "environ":
        return environment()
    raise AttributeError(name)
