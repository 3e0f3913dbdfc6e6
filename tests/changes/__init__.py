"""Tests of the operations, their blocks and the receipt."""
