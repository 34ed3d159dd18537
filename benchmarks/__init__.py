"""Measurements of speed and memory, one program each: `python -m benchmarks.packing`."""
