"""Every tensor type ggml knows, by id and by size: enough to walk a file without decoding it.

Source: ``enum ggml_type`` (``ggml.h``) and the block structs (``ggml-common.h``) of ggml 0.25.3, which is where
Q2_0 comes from; the others have the sizes of ``GGML_QUANT_SIZES`` in gguf-py 0.19, except Q8_1 (36 bytes by its
struct). Ids 31..33 and 36..38 are Q4_0 and IQ4_NL with their rows interleaved for ARM, which files of 2024
may have and ggml no longer reads. Ids 4 and 5 are older than GGUF.
"""

from __future__ import annotations

from typing import NamedTuple


class GGMLType(NamedTuple):
    """A storage type: ``block_bytes`` bytes hold ``block_elements`` consecutive elements of a row."""

    name: str
    id: int
    block_elements: int
    block_bytes: int

    def row_bytes(self, n_elements: int) -> int:
        """Bytes of a row of ``n_elements``; raises ValueError unless it is whole blocks."""
        if n_elements % self.block_elements:
            raise ValueError(
                f"{self.name}: a row of {n_elements} elements is not a multiple of its block of {self.block_elements}"
            )
        return n_elements // self.block_elements * self.block_bytes


_ROWS = """
F32 0 1 4        F16 1 1 2         Q4_0 2 32 18      Q4_1 3 32 20      Q5_0 6 32 22      Q5_1 7 32 24
Q8_0 8 32 34     Q8_1 9 32 36      Q2_K 10 256 84    Q3_K 11 256 110   Q4_K 12 256 144   Q5_K 13 256 176
Q6_K 14 256 210  Q8_K 15 256 292   IQ2_XXS 16 256 66 IQ2_XS 17 256 74  IQ3_XXS 18 256 98 IQ1_S 19 256 50
IQ4_NL 20 32 18  IQ3_S 21 256 110  IQ2_S 22 256 82   IQ4_XS 23 256 136 I8 24 1 1         I16 25 1 2
I32 26 1 4       I64 27 1 8        F64 28 1 8        IQ1_M 29 256 56   BF16 30 1 2       TQ1_0 34 256 54
TQ2_0 35 256 66  MXFP4 39 32 17    NVFP4 40 64 36    Q1_0 41 128 18    Q2_0 42 64 18
Q4_0_4_4 31 32 18       Q4_0_4_8 32 32 18       Q4_0_8_8 33 32 18
IQ4_NL_4_4 36 32 18     IQ4_NL_4_8 37 32 18     IQ4_NL_8_8 38 32 18
"""
_words = _ROWS.split()
_rows = zip(_words[0::4], _words[1::4], _words[2::4], _words[3::4], strict=True)

BY_ID: dict[int, GGMLType] = {int(i): GGMLType(name, int(i), int(n), int(b)) for name, i, n, b in _rows}
BY_NAME: dict[str, GGMLType] = {t.name: t for t in BY_ID.values()}
