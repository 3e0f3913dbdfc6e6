"""Services that ``guest-agent install`` can offer; empty in the source, filled in by the archive.

``runtime/archive.py`` makes this module anew from the templates and from those variants of
``vmprovision.initsystem`` that have a ``live`` part.
"""

CONFIGURATION = b""  # the default settings
BEGIN = END = b""  # the lines around a block in somebody else's file
# The parts of each install._Variant, in the order in which the machine is asked for them.
VARIANTS = ()
