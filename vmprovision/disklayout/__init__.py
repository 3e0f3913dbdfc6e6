"""What lies where on a disk: partition tables and superblocks, parsed from their bytes."""
