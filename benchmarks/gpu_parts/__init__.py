"""The parts of `benchmarks/gpu.py`: each yields rows of figures for `Sizes`."""
