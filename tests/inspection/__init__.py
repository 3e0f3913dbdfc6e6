"""Inspection of release files and small trees, read from a directory."""
