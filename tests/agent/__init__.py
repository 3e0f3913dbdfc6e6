"""Tests of the guest agent: its parts on the running Python, the whole on every interpreter."""
