"""Kills and power cuts at every moment, and the state of the image afterwards."""
