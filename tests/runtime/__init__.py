"""Tests of the bundled runtime: building, choosing, injecting and running it."""
