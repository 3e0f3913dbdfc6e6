"""Facts in, exact operations out."""
