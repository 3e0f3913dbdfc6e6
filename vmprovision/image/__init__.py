"""Disk images: opened, checked and locked, written through a redo log, sealed and merged."""
