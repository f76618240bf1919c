"""The commands of the package: ``python -m dyhead_cuda COMMAND``."""
