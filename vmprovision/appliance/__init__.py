"""The libguestfs appliance: the only part of vmprovision that imports guestfs.

``session`` opens an appliance: a saved one that ``snapshot`` restores, else a ``stock`` one.
``roots`` finds and mounts the operating system, and ``filesystem`` gives the mounted guest
to the floors below.
"""
