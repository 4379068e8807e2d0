"""One op, one row: its NumPy reference, its host kernel, its CUDA kernel (``table.py``)."""
