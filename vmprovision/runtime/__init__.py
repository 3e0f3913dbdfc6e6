"""The interpreter for guests without Python: a static MicroPython that runs the agent's archive.

``port`` has the additions to MicroPython's unix port, ``source`` fetches its source,
``build`` compiles it, ``store`` lists the runtimes that were built, and ``choice``
decides what runs the agent in a guest.
"""
