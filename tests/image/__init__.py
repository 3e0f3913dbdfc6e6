"""Real disk images through the real libguestfs and QEMU."""
