"""How many of a route-replay model's recorded routes llama.cpp takes.

    python benchmarks/synth_in_llama_cpp.py MODEL.gguf TRACE.npz --build BUILD

MODEL comes from ``moe_cupy synth --routes TRACE``; BUILD holds `logits`, built from reference_models/logits.cpp with
llama.cpp's libraries. At most 512 tokens, in one batch.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_cupy.lab.trace import read_trace

MOST_TOKENS = 512  # the context of `logits`


def records(raw: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of each record that `logits` wrote."""
    at = 0
    while at < len(raw):
        (length,) = struct.unpack_from("<i", raw, at)
        is_integer, columns, rows = struct.unpack_from("<iqq", raw, at + 4 + length)
        name = raw[at + 4 : at + 4 + length].decode()
        at += 24 + length
        yield name, np.frombuffer(raw, "<i4" if is_integer else "<f4", columns * rows, at).reshape(rows, columns)
        at += 4 * columns * rows


def routes_taken(program: Path, model: Path, count: int) -> dict[int, np.ndarray]:
    """Layer -> experts [T, k] that llama.cpp chose for ids 0..count-1."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "tokens"), Path(folder, "out")
        np.arange(count, dtype="<i4").tofile(given)
        subprocess.run([program, model, given, made, "0"], check=True)
        found = {name: array.copy() for name, array in records(made.read_bytes()) if "topk" in name}
    return {int(name.rpartition("-")[2]): array for name, array in found.items()}


def main() -> None:
    """Print the share of (token, layer) events whose set of experts is the recorded one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--build", type=Path, required=True)
    args = parser.parse_args()
    wanted = read_trace(args.trace).experts[:MOST_TOKENS]  # [T, L, k]
    taken = routes_taken(args.build / "logits", args.model, len(wanted))
    got = np.stack([taken[layer] for layer in sorted(taken)], axis=1)  # [T, L, k]
    same = (np.sort(got, axis=2) == np.sort(wanted, axis=2)).all(axis=2)
    print(f"llama.cpp took {same.sum()} of {same.size} recorded routes ({same.mean():.2%})")


if __name__ == "__main__":
    main()
