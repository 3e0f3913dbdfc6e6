"""What is known of a guest: its facts, its text files, and the agent's settings in it."""
