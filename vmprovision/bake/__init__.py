"""Golden images from a file: fetched, injected, verified, proven, converted, described.

This room needs the extra ``vmprovision[bake]``; nothing below it imports it.
"""

from vmprovision.bake.loading import load_bake_file
from vmprovision.bake.results import BakeOptions, BakeResult
from vmprovision.bake.run import bake, bake_many, find_bake_files
from vmprovision.bake.schema import schema_text

__all__ = [
    "BakeOptions",
    "BakeResult",
    "bake",
    "bake_many",
    "find_bake_files",
    "load_bake_file",
    "schema_text",
]
