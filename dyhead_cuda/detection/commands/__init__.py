"""The commands about detectors: ``python -m dyhead_cuda train``, ``eval``, ``predict``, ..."""
