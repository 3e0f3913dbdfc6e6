"""A guest's files: the Protocols that all other rooms use, and a directory of the host."""
