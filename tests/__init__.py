"""The tests; ``tests.conftest`` holds what they share."""
