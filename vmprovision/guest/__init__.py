"""A guest's facts, its text files, and the agent's settings in it."""
