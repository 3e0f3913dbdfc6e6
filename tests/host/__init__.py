"""Tests of what vmprovision reads from the host."""
