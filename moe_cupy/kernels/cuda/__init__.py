"""CUDA kernels as text (``*.cu``), how to launch them, and what they are checked against; no GPU is needed here."""
