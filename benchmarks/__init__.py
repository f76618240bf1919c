"""Microbenchmarks, run as ``python -m benchmarks.NAME``: each checks results, then times them."""
