"""Kills and power cuts at every moment, and what becomes of the image."""
