"""QEMU as a supervised process: its monitor, its accelerator, and its end with its parent."""
