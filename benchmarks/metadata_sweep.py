"""One key of a model's metadata dropped, zeroed, changed or added: the reference against llama.cpp, variant by variant.

    python benchmarks/metadata_sweep.py --llama-python PYTHON [--key TEXT] [--write RECORDS.json]
        [--record tests/data/metadata.json] [MODEL.gguf …]

Every small model of the reference sets is varied in each ``{arch}.*`` key that it has (dropped, zero, doubled, halved,
another choice) and in each of ``ADDED`` that it lacks. Both run the file expanded to float32. PYTHON is one that has
xllamacpp (llama_cpp_logits.py). Verdicts: ``agree``; ``both refuse``; ``refused``: by the reference alone; ``alone``:
run by the reference alone; ``WRONG``: other logits. Exit code 1 if a variant is WRONG. ``--record`` keeps, for tests,
what llama.cpp makes of the variants that change something.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_ref.gguf_write import header, padding
from moe_ref.model import Model
from moe_ref.split import open_model
from moe_ref.weights import Weights

if TYPE_CHECKING:
    from benchmarks.llama_cpp_logits import Llama

ROOT = Path(__file__).resolve().parents[1]
MODELS = [ROOT / "tests" / "data" / "archs", ROOT.parent / "shared" / "data" / "golden" / "archs"]
SAME = ("block_count", "embedding_length")  # the tensors say these, and everything else depends on them
TOKENS = np.random.default_rng(5).integers(0, 300, 48).tolist()
CHOICES = {"rope.scaling.type": ("none", "linear", "yarn", "longrope", "", "dynamic"), "expert_gating_func": range(6)}
SHOWN = ("verdict", "model", "change", "error", "warning", "ours", "llama.cpp")
IDS = slice(0, None, 48)  # whose logits at the last position are recorded
U, F = np.uint32, np.float32
ADDED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True, False),
    "attention.clamp_kqv": (F(0), F(0.5)),
    "attention.head_count_kv": (U(1),),
    "attention.key_length": (U(16), U(32)),
    "attention.key_length_mla": (U(16),),
    "attention.key_length_swa": (U(16), U(32)),
    "attention.layer_norm_epsilon": (F(0.1),),
    "attention.layer_norm_rms_epsilon": (F(0.1),),
    "attention.recurrent_layers": ([False, True, False, True],),
    "attention.scale": (F(0), F(0.5)),
    "attention.shared_kv_layers": (U(0), U(1)),
    "attention.sliding_window": (U(0), U(4)),
    "attention.sliding_window_pattern": (U(0), U(1), U(2), U(3), [True, False, True, False], [False] * 4),
    "attention.temperature_length": (U(4),),
    "attention.temperature_scale": (F(0.1),),
    "attention.value_length": (U(16), U(32)),
    "attention.value_length_swa": (U(16), U(32)),
    "attn_logit_softcapping": (F(0), F(5)),
    "embedding_length_out": (U(0), U(32)),
    "embedding_scale": (F(0), F(2)),
    "expert_count": (U(0), U(8)),
    "expert_feed_forward_length": (U(0), U(8)),
    "expert_gating_func": tuple(map(U, range(5))),
    "expert_group_count": (U(0), U(1), U(2), U(4)),
    "expert_group_used_count": (U(0), U(1)),
    "expert_shared_count": (U(0), U(1)),
    "expert_shared_feed_forward_length": (U(0), U(24)),
    "expert_weights_norm": (True, False),
    "expert_weights_scale": (F(0), F(2)),
    "final_logit_softcapping": (F(0), F(5)),
    "full_attention_interval": (U(0), U(2)),
    "interleave_moe_layer_step": (U(0), U(1), U(2)),
    "leading_dense_block_count": (U(0), U(1)),
    "logit_scale": (F(0), F(2)),
    "nextn_predict_layers": (U(0), U(1)),
    "residual_scale": (F(0), F(0.5)),
    "rope.dimension_count": (U(0), U(8), U(16)),
    "rope.dimension_count_swa": (U(0), U(8), U(16)),
    "rope.dimension_sections": ([1, 1, 1, 0], [2, 1, 1, 0], [0, 0, 0, 0]),
    "rope.freq_base": (F(500),),
    "rope.freq_base_swa": (F(0), F(500)),
    "rope.scale_linear": (F(0), F(4)),
    "rope.scaling.alpha": (F(0), F(2)),
    "rope.scaling.attn_factor": (F(0), F(1.5)),
    "rope.scaling.factor": (F(0), F(4)),
    "rope.scaling.finetuned": (True,),
    "rope.scaling.original_context_length": (U(0), U(16)),
    "rope.scaling.type": ("none", "linear", "yarn", "longrope"),
    "rope.scaling.yarn_attn_factor": (F(2),),
    "rope.scaling.yarn_beta_fast": (F(8),),
    "rope.scaling.yarn_beta_slow": (F(2),),
    "rope.scaling.yarn_ext_factor": (F(0.5),),
    "rope.scaling.yarn_log_multiplier": (F(0), F(0.1)),
    "vocab_size": (U(0), U(100), U(1000)),
}


@dataclass(frozen=True)
class Source:
    """A model expanded to float32: its metadata as it lies in the file, and its tensors."""

    name: str
    architecture: str
    metadata: dict[str, Any]
    raw: dict[str, bytes]
    tensors: list[tuple[str, str, tuple[int, ...]]]
    data: bytes

    def write(self, path: Path, changed: dict[str, Any]) -> None:
        """A file with some keys changed; None leaves one out."""
        raw = {**self.raw, **{key: None if value is None else typed(value) for key, value in changed.items()}}
        kept = {key: value for key, value in raw.items() if value is not None}
        path.write_bytes(header(kept, self.tensors, 32) + self.data)


def read_source(path: Path) -> Source:
    with open_model(path) as file:
        weights, data = Weights(file, np.float32), b""
        for name in file.tensors:
            raw = np.ascontiguousarray(weights[name], np.float32).tobytes()
            data += raw + padding(len(raw), 32)
        return Source(
            name=path.name.removesuffix(".gguf"),
            architecture=file.metadata["general.architecture"],
            metadata={key: plain(value) for key, value in file.metadata.items()},
            raw={key: file.value_bytes(key) for key in file.metadata},
            tensors=[(name, "F32", info.shape) for name, info in file.tensors.items()],
            data=data,
        )


def plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


# Variants

_CODES = {np.dtype(code): i for i, code in {4: "u4", 5: "i4", 6: "f4", 7: "?"}.items()}
STRING, ARRAY = 8, 9


def typed(value: Any) -> bytes:
    """Type id and value as in a file: text, a NumPy number, a bool or a list of whole numbers or bools."""
    if isinstance(value, str):
        return struct.pack("<IQ", STRING, len(value.encode())) + value.encode()
    array = np.asarray(value)
    array = array.astype("u4") if array.dtype == np.int64 else array
    head = struct.pack("<IIQ", ARRAY, _CODES[array.dtype], array.size) if array.ndim else None
    return (head or struct.pack("<I", _CODES[array.dtype])) + array.tobytes()


def stored_dtype(raw: bytes) -> np.dtype:
    """Type of a metadata number, or of the elements of an array."""
    kind = int.from_bytes(raw[4:8] if raw[0] == ARRAY else raw[:4], "little")
    return next(dtype for dtype, i in _CODES.items() if i == kind)


def changes(key: str, value: Any, raw: bytes, layers: int) -> Iterator[Any]:
    """Values for a key that the file has; None drops it."""
    yield None
    if key in CHOICES:
        yield from (choice if isinstance(choice, str) else U(choice) for choice in CHOICES[key])
        return
    dtype = stored_dtype(raw)
    array = np.array(value, dtype)
    yield from [~array] if dtype.kind == "b" else [array * 0, array * 2, (array / 2).astype(dtype)]
    if array.ndim:
        yield from (array[:-1], array.astype("u4").flat[0])
    elif key.startswith("attention.head_count"):
        yield from (np.array([value] * count, dtype) for count in (layers, layers + 1))


def variants(source: Source) -> Iterator[dict[str, Any]]:
    """Keys and their values, for all variants of one model."""
    prefix = source.architecture + "."
    have = {name.removeprefix(prefix) for name in source.metadata if name.startswith(prefix)}
    for key in sorted(have - set(SAME)):
        name = prefix + key
        for value in changes(key, source.metadata[name], source.raw[name], source.metadata[prefix + SAME[0]]):
            if value is None or typed(value) != source.raw[name]:
                yield {name: value}
    for key in sorted(set(ADDED) - have):
        yield from ({prefix + key: value} for value in ADDED[key])
    for kind in CHOICES["rope.scaling.type"]:  # the two decide together
        yield {prefix + "rope.scaling.type": kind, prefix + "rope.scaling.factor": F(4)}


# What the two make of one


def reference(path: Path) -> tuple[np.ndarray | str, str]:
    """Logits, or the refusal; and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = Model(path)
            logits = model.logits(TOKENS)
            model.close()
        except ValueError as error:
            return str(error).replace(str(path), "FILE"), ""
    return logits, "; ".join(str(w.message) for w in said)


def verdict(ours: np.ndarray | str, theirs: np.ndarray | str, allowed: float) -> tuple[str, float]:
    """The verdict, and the largest difference of logits where there are two."""
    if isinstance(ours, str) or isinstance(theirs, str):
        both = isinstance(ours, str) and isinstance(theirs, str)
        return ("both refuse" if both else "refused" if isinstance(ours, str) else "alone"), 0.0
    if ours.shape != theirs.shape:
        return "WRONG", float("inf")
    if not np.isfinite(theirs).all():
        return ("alone" if np.isfinite(ours).all() else "agree"), 0.0
    error = float(np.nan_to_num(np.abs(ours - theirs), nan=np.inf).max())
    return ("agree" if error <= allowed * max(1.0, float(theirs.std())) else "WRONG"), error


def sweep(source: Source, llama: Llama, folder: Path) -> Iterator[dict[str, Any]]:
    """A record a variant; the model as it is comes first."""
    path, allowed, before = folder / "variant.gguf", 1e-3, None
    for changed in [{}, *variants(source)]:
        source.write(path, changed)
        ours, said = reference(path)
        answer = llama.logits(path, TOKENS)
        theirs = answer if isinstance(answer, str) else np.frombuffer(answer, np.float32).reshape(len(TOKENS), -1)
        judged, error = verdict(ours, theirs, allowed)
        if not changed:
            before = theirs
            if source.architecture == "gemma4":  # this build of llama.cpp looks GELU up in half precision
                judged, allowed = "agree", max(allowed, 3 * error)
        moved = not isinstance(theirs, str) and bool(np.abs(theirs - before).max() > 10 * allowed)
        yield {
            "model": source.name, "change": {key: plain(value) for key, value in changed.items()}, "verdict": judged,
            "error": error, "warning": said, "ours": ours if isinstance(ours, str) else "",
            "llama.cpp": theirs if isinstance(theirs, str) else "", "allowed": allowed, "moved": moved,
            "logits": [] if isinstance(theirs, str) else np.round(theirs[-1, IDS].astype(float), 4).tolist(),
        }  # fmt: skip


def recorded(records: list[dict[str, Any]]) -> str:
    """What tests compare with: by model, the change and llama.cpp's logits, or null where both refuse."""
    models: dict[str, list[Any]] = {}
    for r in records:
        if r["verdict"] == "both refuse" or (r["verdict"] == "agree" and (r["moved"] or not r["change"])):
            models.setdefault(r["model"], []).append([r["change"], r["logits"] or None, r["allowed"]])
    lines = [f'"{m}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]" for m, rows in models.items()]
    return "{\n" + f'"tokens": {TOKENS},\n' + ",\n".join(lines) + "\n}\n"


def main() -> int:
    from llama_cpp_logits import Llama

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.gguf", help="default: the reference sets")
    parser.add_argument("--llama-python", required=True, help="a Python that has xllamacpp")
    parser.add_argument("--key", default="", help="print variants only of keys that hold this text")
    parser.add_argument("--write", type=Path, help="all records as JSON")
    parser.add_argument("--record", type=Path, help="what tests compare with")
    args = parser.parse_args()
    models = args.models or [path for folder in MODELS for path in sorted(folder.glob("*.gguf"))]
    records = []
    with Llama(args.llama_python) as llama, tempfile.TemporaryDirectory() as folder:
        for path in models:
            for r in sweep(read_source(path), llama, Path(folder)):
                records.append(r)
                if r["verdict"] != "agree" and any(args.key in key for key in r["change"]):
                    print(*(r[name] for name in SHOWN if r[name]), sep="  ", flush=True)
    if args.write:
        args.write.write_text(json.dumps(records, indent=0))
    if args.record:
        args.record.write_text(recorded(records))
    counts = Counter(record["verdict"] for record in records)
    print(f"{len(records)} variants of {len(models)} models:", ", ".join(f"{n} {v}" for v, n in counts.most_common()))
    return int(counts["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
