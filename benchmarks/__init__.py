"""How fast, how large and how right, against what people run: ``python -m benchmarks``.

Every implementation gets the same random inputs and parameters and is compared with the reference
in float64 before it is timed; one that is wrong is reported and not timed. ``study`` trains
detectors with and without the head, ``gpu_check`` does everything that needs a GPU, in the
steps of ``gpu_steps``; ``results`` holds committed runs.
"""
