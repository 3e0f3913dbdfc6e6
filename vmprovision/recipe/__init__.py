"""Recipes of guest images, and how an image is built from one.

A recipe is a folder in ``images/``: ``recipe.toml``, and the tree ``files/`` that
is copied into the guest.  Nothing is mounted on the host and no root is needed:
mmdebstrap(1) makes the guest's files in a namespace of its own, and a libguestfs
appliance puts them on a disk.
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
