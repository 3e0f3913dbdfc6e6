"""Virtual machines by HTTP: created over libvirt, with the agent in them; docs/serve.md.

This room needs the extra ``vmprovision[server]``; nothing below it imports it.
"""
