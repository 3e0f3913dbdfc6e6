"""Boots of real guests under QEMU."""
