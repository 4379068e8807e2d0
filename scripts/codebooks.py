"""Write the i-quants' codebooks for ``moe_ref``: `python scripts/codebooks.py [FILE.npz]`.

Reads them from the Python package gguf (MIT licence; https://github.com/ggml-org/llama.cpp, gguf-py), whose
``gguf/quants.py`` holds the tables of ggml's ``ggml-common.h`` in hexadecimal: a few bits a weight, each an
index into the levels of the format.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_ref.quants.blocks import fields  # noqa: E402
from moe_ref.quants.codebooks import BOOKS, FILE  # noqa: E402

# Book -> the class of gguf.quants that holds it (IQ1_M shares the book of IQ1_S).
OWNERS = {book: book[:3].upper() + "_" + book[3:].upper() for book in BOOKS}


def unpack(packed: bytes, levels: tuple[int, ...], shape: tuple[int, int]) -> np.ndarray:
    """Hexadecimal text of bytes, each of several codes (lowest first) -> int8 points."""
    bits = 2 if len(levels) < 5 else 4  # three levels take 2 bits; eight take 4 here, to stay within bytes
    words = np.frombuffer(bytes.fromhex(packed.decode()), np.uint8)
    return np.array(levels, np.int8)[fields(words, bits)].reshape(shape)


def read_books() -> dict[str, np.ndarray]:
    """Every codebook by name. Raises ValueError if gguf's levels or sizes are not the ones that moe_ref states."""
    found = {}
    for book, (points, width, levels) in BOOKS.items():
        owner = getattr(gguf.quants, OWNERS[book])
        if owner.grid_map != levels or owner.grid_shape != (points, width):
            raise ValueError(f"{book}: gguf has {owner.grid_shape} of {owner.grid_map}, expected {BOOKS[book]}")
        found[book] = unpack(owner.grid_hex, levels, owner.grid_shape)
    return found


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    books: dict[str, Any] = read_books()
    np.savez_compressed(target, **books)
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
