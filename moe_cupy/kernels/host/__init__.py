"""Host kernels: Numba, compiled once and cached on disk, all of them releasing the interpreter lock."""

from moe_cupy.kernels.host.compiled import forget_stale

forget_stale()
