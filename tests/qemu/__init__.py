"""Tests of QEMU as a supervised process."""
