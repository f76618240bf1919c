"""Committed benchmark results, and the check that wants a GPU; see ``dyhead_cuda.bench``."""
