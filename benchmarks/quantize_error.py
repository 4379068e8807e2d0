"""Root-mean-square error of our encoders and of ggml's: `python benchmarks/quantize_error.py [--libggml PATH]`.

With `--libggml` (a llama.cpp build's `libggml-base.so`) ggml encodes Gaussian numbers and tensors of the trained
model, without an importance matrix; without it, its bytes are those of the shared vectors, made with one of ones.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_ref.gguf import open_gguf  # noqa: E402
from moe_ref.quantize import TYPES, is_weight  # noqa: E402
from moe_ref.quants import BY_NAME, dequantize, quantize  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"
BLOCK_TYPES = [name for name in TYPES if BY_NAME[name].block_elements > 1]
Encoder = Callable[[np.ndarray, str], np.ndarray]


def ggml_encoder(path: str) -> Encoder:
    """float32 [rows, width], type name -> uint8 [rows, row bytes], by ``ggml_quantize_chunk`` of a shared library."""
    encode = ctypes.CDLL(path).ggml_quantize_chunk
    encode.restype = ctypes.c_size_t
    encode.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def run(x: np.ndarray, name: str) -> np.ndarray:
        out = np.empty((len(x), BY_NAME[name].row_bytes(x.shape[1])), np.uint8)
        encode(BY_NAME[name].id, x.ctypes.data, out.ctypes.data, 0, *x.shape, None)
        return out

    return run


def sources() -> Iterator[tuple[str, list[np.ndarray]]]:
    """Names and matrices [rows, width]: 1 M Gaussian numbers, and every weight matrix of the trained model."""
    yield "Gaussian", [np.random.default_rng(7).standard_normal((512, 2048)).astype(np.float32)]
    path = SHARED / "trained" / "moe-40m-Q8_0.gguf"
    if path.exists():
        with open_gguf(path) as file:
            found = [t for t in file.tensors.values() if is_weight(t)]
            arrays = [dequantize(file.read(t.name), t.type, t.shape) for t in found]
        yield "trained", [np.ascontiguousarray(a.reshape(-1, a.shape[-1])) for a in arrays]


def errors(matrices: list[np.ndarray], raw: list[np.ndarray], name: str) -> np.ndarray:
    """Root-mean-square error of each matrix [matrices]."""
    pairs = zip(matrices, raw, strict=True)
    return np.array([np.sqrt(np.square(x - dequantize(r.ravel(), name, x.shape)).mean(dtype="f8")) for x, r in pairs])


def show(label: str, name: str, matrices: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    """One row: mean errors, their ratio over all matrices and for the worst, equal bytes, speed."""
    start = time.perf_counter()
    ours = [quantize(x, name) for x in matrices]
    speed = sum(x.size for x in matrices) / (time.perf_counter() - start) / 1e6
    a, b = errors(matrices, ours, name), errors(matrices, theirs, name)
    ratios = np.divide(a, b, out=np.ones_like(a), where=b > 0)
    same = np.mean(np.concatenate([(x == y).ravel() for x, y in zip(ours, theirs, strict=True)]))
    total = a.mean() / b.mean() if b.mean() else 1.0
    row = f"{a.mean():.6f} | {b.mean():.6f} | {total:.4f} | {ratios.max():.4f} | {same:.2%} | {speed:.1f}"
    print(f"| {name} | {label} | {row} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--libggml", help="a shared library with ggml_quantize_chunk")
    args = parser.parse_args()
    print("| type | numbers | RMSE ours | RMSE ggml | ratio | worst matrix | same bytes | M weights/s |")
    print("|---|---|---|---|---|---|---|---|")
    if args.libggml:
        encode = ggml_encoder(args.libggml)
        for label, matrices in sources():
            for name in BLOCK_TYPES:
                show(label, name, matrices, [encode(x, name) for x in matrices])
        return
    with np.load(SHARED / "golden" / "dequant_vectors.npz") as vectors:
        source = vectors["source"]
        for key in vectors.files:
            name = key.removesuffix("/src_bytes").upper()
            if name in BLOCK_TYPES:
                show("vectors", name, [source], [vectors[key].reshape(len(source), -1)])


if __name__ == "__main__":
    main()
