"""Checks of the rendered files by the init systems' own programs, which also run them."""
