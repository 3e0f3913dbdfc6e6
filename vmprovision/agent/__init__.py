"""The guest agent: health, metrics and address reports from inside a guest.

One source serves CPython 2.6 to 3.14 and MicroPython; ``compat`` has the differences.
"""

__version__ = "0.1.0"
