"""The libguestfs appliance: the only part of vmprovision that imports guestfs.

``session`` launches one and translates its errors, ``accelerator`` decides
between KVM and TCG, ``roots`` finds and mounts the operating system,
``filesystem`` gives the mounted guest to the floors below.
"""
