"""The CPU library for aarch64, compiled here and run under qemu's emulation of such a processor."""
