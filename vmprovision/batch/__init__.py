"""Many images: an injection of each, side by side, here or on a cluster."""
