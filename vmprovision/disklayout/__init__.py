"""Partition tables and superblocks of a disk, parsed from its bytes."""
