"""Makes logits.npz (README.md): python tests/data/kv/make.py LLAMA_LOGITS [FOLDER OF REFERENCE FILES]."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gguf_writer import write_gguf  # noqa: E402
from latent_model import latent_model  # noqa: E402

from moe_ref.gguf import GGUFArray, open_gguf  # noqa: E402
from moe_ref.quants import dequantize  # noqa: E402

LAST = 6  # positions kept
LATENT = {"latent": False, "latent-old": True}
CASES = {
    "qwen3moe-256.Q8_0": "q8_0/q8_0 q4_0/q4_0 f16/q8_0 f32/q4_0",
    "qwen3moe.BF16": "q8_0/f16 f16/f16 q4_0/q4_0",
    "granitemoe.F16": "f16/f16 bf16/bf16",
    "llama4.BF16": "q8_0/q8_0 q4_0/q4_0",
    "gpt-oss.BF16": "q8_0/q8_0 q4_0/q4_0 bf16/bf16",
    "qwen3next.BF16": "q8_0/q8_0 q4_0/q4_0",
    "latent": "f16/f16 q8_0/q8_0 q4_0/q4_0",
    "latent-old": "q8_0/q8_0 q4_0/q4_0",
}


def value(raw: Any) -> Any:
    """Metadata in the widths that llama.cpp expects."""
    if not isinstance(raw, GGUFArray):
        return np.uint32(raw) if type(raw) is int and raw >= 0 else raw
    items = list(raw)
    if items and isinstance(items[0], str):
        return items
    return np.asarray(items, {bool: np.bool_, float: np.float32}.get(type(items[0]), np.int32))


def expanded(source: Path, target: Path) -> Path:
    """The same weights as float32, which llama.cpp multiplies without rounding."""
    with open_gguf(source) as file:
        keys = {k: value(v) for k, v in file.metadata.items() if k != "general.alignment"}
        weights = {n: dequantize(file.read(n), i.type, i.shape, n) for n, i in file.tensors.items()}
    return write_gguf(target, keys, {n: ("F32", w.shape, w.astype("<f4").tobytes()) for n, w in weights.items()})


def logits(program: str, model: Path, kinds: str, tokens: np.ndarray) -> np.ndarray:
    key, _, val = kinds.partition("/")
    out, flash = model.with_suffix(".f32"), str(int(val in ("q8_0", "q4_0")))
    subprocess.run([program, model, out, key, val, flash, *map(str, tokens)], check=True, stderr=subprocess.DEVNULL)
    return np.fromfile(out, np.float32).reshape(len(tokens), -1)


def main(program: str, golden: str = str(ROOT.parent / "shared/data/golden")) -> None:
    tokens = np.random.default_rng(5).integers(0, 384, 24).astype(np.int32)
    made = {"tokens": tokens}
    with tempfile.TemporaryDirectory() as folder:
        for name, cases in CASES.items():
            path = Path(folder) / f"{name}.gguf"
            if name in LATENT:
                latent_model(path, LATENT[name])
            else:
                expanded(next(Path(golden).glob(f"*/{name}.gguf")), path)
            for kinds in cases.split():
                made[f"{name}/{kinds}"] = logits(program, path, kinds, tokens)[-LAST:]
    np.savez_compressed(HERE / "logits.npz", **made)


if __name__ == "__main__":
    main(*sys.argv[1:])
