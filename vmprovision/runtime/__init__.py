"""The interpreter for guests without Python: a static MicroPython that runs the agent's archive.

``port`` holds what we add to MicroPython's unix port, ``source`` fetches its
source, ``build`` compiles it, ``store`` knows what has been built, and
``choice`` decides what runs the agent in a guest.
"""
