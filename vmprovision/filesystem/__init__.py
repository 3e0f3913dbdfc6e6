"""A guest's files: the Protocols that the rest of the program sees, and a directory of the host."""
