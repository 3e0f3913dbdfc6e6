"""Hostile guests, images and files beside them, each read within time and memory limits."""
