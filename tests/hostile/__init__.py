"""Guests, images and neighbours that mean harm, with time and memory limits on each."""
