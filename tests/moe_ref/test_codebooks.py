"""The codebooks of the i-quants are ggml's, and their file can be made again."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_ref.quants.codebooks import BOOKS, EVEN_SIGNS, FILE, SIGNS, codebook

ROOT = Path(__file__).resolve().parents[2]

SHA256 = {
    "iq1s": "07540ffc1aeaf6ad4d97e96b0fcc765aae39671d4ae4a27bbd0e796fde167c6a",
    "iq2xxs": "05826b5d3e472a3a78f196be62ac78acf81df0f909626e12ab9fa2a5d490dd54",
    "iq2xs": "06e47aaca60b4dc1d9b5a3f34540437058a6b142b4d7a59d5ded769b4d1bf1de",
    "iq2s": "e1aa1473412b0552c2174c30ef22ab4073f6a181b85a17056e8249bd2932fd88",
    "iq3xxs": "46e35f5a997efdee6c99ce57854c8a0d4f0ff8ca57e5e8a60c0793ea580acf5d",
    "iq3s": "bd1af4945a1717c65610b0284e4628b9a1ba3b306fae3a06f6e5f597356e349f",
}


@pytest.mark.parametrize("book", BOOKS)
def test_codebook_is_the_one_of_ggml(book):
    points, width, levels = BOOKS[book]
    grid = codebook(book)
    assert (grid.shape, grid.dtype) == ((points, width), np.int8)
    assert hashlib.sha256(grid.tobytes()).hexdigest() == SHA256[book]
    assert set(np.unique(grid)) == set(levels) and len(np.unique(grid, axis=0)) == points
    with pytest.raises(ValueError, match="read-only"):
        grid[0, 0] = 0


def test_codebook_file_holds_the_books_and_nothing_else_in_little_space():
    with np.load(FILE) as file:
        assert set(file.files) == set(BOOKS) == set(SHA256)
    assert FILE.stat().st_size < 10_000, FILE.stat().st_size


def test_codebook_file_is_what_the_script_writes(tmp_path):
    pytest.importorskip("gguf")
    target = tmp_path / "again.npz"
    argv = [sys.executable, str(ROOT / "scripts/codebooks.py"), str(target)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    with np.load(target) as again:
        assert set(again.files) == set(BOOKS)
        for book in BOOKS:
            assert again[book].dtype == np.int8 and np.array_equal(again[book], codebook(book)), book


def test_eighth_sign_makes_the_number_of_negative_weights_even():
    assert SIGNS.shape == (256, 8) and SIGNS[0b1000_0001].tolist() == [-1, 1, 1, 1, 1, 1, 1, -1]
    assert EVEN_SIGNS.shape == (128, 8) and (EVEN_SIGNS.prod(axis=1) == 1).all()
    gguf = pytest.importorskip("gguf")
    theirs = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)  # ggml's table, which the rule replaces
    assert np.array_equal(EVEN_SIGNS, SIGNS[theirs])
