"""The guest agent: health, metrics and address reports from inside a guest.

One source for CPython 2.6 to 3.14 and MicroPython; see ``compat`` for what
that costs.
"""

__version__ = "0.1.0"
