"""Tests of ``vmprovision serve``."""
