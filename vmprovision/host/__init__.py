"""This host: its programs, its capacity, and the directories that vmprovision keeps."""
