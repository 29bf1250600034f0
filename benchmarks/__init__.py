"""``python -m benchmarks``: this package beside flash-linear-attention, softmax attention and the floor, in one run. See ``--help``."""
