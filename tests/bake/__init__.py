"""Tests of `vmprovision bake`."""
