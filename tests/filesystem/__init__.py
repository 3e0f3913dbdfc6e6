"""One contract over both implementations of a guest filesystem."""
