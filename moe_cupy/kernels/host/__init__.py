"""Host kernels: Numba, compiled once and cached on disk, all of them releasing the interpreter lock."""
