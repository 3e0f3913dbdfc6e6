"""Recipes of guest images, and building images from them.

A recipe is a folder in ``images/``: ``recipe.toml``, and the tree ``files/`` that
is copied into the guest.  Building mounts nothing on the host and needs no root:
mmdebstrap(1) makes the guest's files in a namespace of its own, and a libguestfs
appliance copies them to a disk.
"""

from vmprovision.recipe.build import build_image
from vmprovision.recipe.schema import (
    DiskLayout,
    Recipe,
    find_recipe,
    list_recipes,
    parse_recipe,
)

__all__ = [
    "DiskLayout",
    "Recipe",
    "build_image",
    "find_recipe",
    "list_recipes",
    "parse_recipe",
]
