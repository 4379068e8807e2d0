"""Which kernel multiplies many vectors with a matrix, and which kernels the engine never launches.

The choice depends on the device and on what the whole pass asks, never on what happens to be resident: so the bits of
a result do not depend on how experts are spread over launches.
"""

from __future__ import annotations

# Tensor cores multiply bytes from Turing on; before it (CUDA 12 serves compute capability 6.1 to 7.2) there is dp4a.
TENSOR_CORES = (7, 5)
# A tile has room for 32 vectors. With fewer than this half of it and more is padding, and all that the product waits
# for is the matrix itself, which both kernels read once.
FEW_VECTORS = 16
# A tile costs what its 32 vectors would, however many there are, and reads the matrix once; row by row it is read for
# each. On a card with 28e12 multiply-adds and 960e9 bytes a second, at a third of its peak, a weight of 4.5 bits costs
# a tile 0.9 ps with dp4a and 3.4 ps in float32; each vector costs 0.6 ps of reading.
TILE_PAYS = {True: 2, False: 8}  # vectors, rounded and not

# Kernels that explain another one, and are run by tests, gpu-check and notebooks alone.
TEACHING = {
    "gemv_naive": "gemv",  # a thread a row: loads that do not coalesce
    "gemm_pipelined": "gemm",  # two tiles: loads that nothing waits for
}


def pays_tiles(is_rounded: bool, vectors: float) -> bool:
    """Whether an expert that ``vectors`` vectors meet, on average, goes by tiles rather than row by row for each."""
    return vectors >= TILE_PAYS[is_rounded]


def product_variant(capability: tuple[int, int], is_rounded: bool, vectors: float) -> str:
    """The variant of ``gemm`` for a matrix that ``vectors`` vectors meet, on average; "" is plain.

    Of every block format there are both. Activations that are not rounded have one kernel (``gemm_float``).
    """
    return "mma" if is_rounded and capability >= TENSOR_CORES and vectors >= FEW_VECTORS else ""
