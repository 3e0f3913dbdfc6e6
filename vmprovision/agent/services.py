"""Services for ``guest-agent install``; empty in the source, filled in by the archive.

``runtime/archive.py`` generates this module from the templates and from those variants
in ``vmprovision.initsystem`` that have a ``live`` part.
"""

CONFIGURATION = b""  # the default settings
BEGIN = END = b""  # the lines around a block in another program's file
# The parts of each install._Variant, in the order in which they are tried.
VARIANTS = ()
