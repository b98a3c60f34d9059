"""Parts of kernels/bench.py: layers, rotated weights, timing, the roof, the kernels that compete, and the table."""
