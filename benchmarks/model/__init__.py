"""What the CUDA kernels should take on a GPU, from counts: no GPU is needed, and none is measured.

The emulation runs some blocks of every launch of the standard problem and counts what a device
would charge (:mod:`benchmarks.model.work`); the disassembler says how many instructions the main
loops have; :mod:`benchmarks.model.devices` says what GPUs can do, and what is assumed. From these
:mod:`benchmarks.model.times` gets a lower bound for each kernel and what limits it.
"""
