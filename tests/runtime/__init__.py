"""The bundled runtime: built, chosen, put into guests, and run."""
