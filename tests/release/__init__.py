"""Tests of what a release is made with."""
