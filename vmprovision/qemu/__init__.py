"""QEMU: start it as a supervised process, speak its monitor's protocol, choose its accelerator."""
