"""The saved appliance: build it once on a host, store it, restore it for every image.

``build`` boots libguestfs's appliance and saves the machine; ``store`` keeps it in the
cache and decides what is trusted; ``restore`` runs it again; ``host`` picks the one
that works on this host, with KVM or without.
"""
