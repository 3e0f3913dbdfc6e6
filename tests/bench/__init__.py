"""Measurements, for `nox -s bench`: each module writes its table into the documentation."""
