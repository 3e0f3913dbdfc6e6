"""Tests of what is read of this host."""
