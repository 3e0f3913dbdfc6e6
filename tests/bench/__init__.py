"""Benchmarks: what ``nox -s bench`` measures and writes into the documentation."""
