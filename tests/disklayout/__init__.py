"""Tests of the parsers of partition tables and superblocks."""
