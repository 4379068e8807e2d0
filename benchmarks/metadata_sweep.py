"""One key of a model's metadata dropped, zeroed, changed or added: the reference against llama.cpp, variant by variant.

    python benchmarks/metadata_sweep.py --llama-python PYTHON [--only NAME …] [--write FILE.json] [MODEL.gguf …]

Every small model of the reference sets is varied in each ``{arch}.*`` key that it has (dropped, zero, doubled or halved,
another choice) and in each of ``ADDED`` that it lacks. Both run the file expanded to float32. PYTHON is one that has
xllamacpp (llama_cpp_logits.py). Verdicts: ``agree``; ``both refuse``; ``refused``: by the reference alone; ``alone``: by
llama.cpp alone; ``WRONG``: other logits. Exit code 1 if a variant is WRONG.
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
from typing import Any

import numpy as np
from llama_cpp_logits import Llama

from moe_ref.gguf_write import header, padding
from moe_ref.model import Model
from moe_ref.split import open_model
from moe_ref.weights import Weights

ROOT = Path(__file__).resolve().parents[1]
MODELS = [ROOT / "tests" / "data" / "archs", ROOT.parent / "shared" / "data" / "golden" / "archs"]
SAME = ("block_count", "embedding_length")  # the tensors say these, and everything else depends on them
TOKENS = np.random.default_rng(5).integers(0, 300, 48).tolist()
CHOICES = {"rope.scaling.type": ("none", "linear", "yarn", "longrope", "", "dynamic"), "expert_gating_func": range(6)}
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

    def write(self, path: Path, changed: dict[str, bytes | None]) -> None:
        """A file with some keys changed; None leaves one out."""
        metadata = {key: value for key, value in {**self.raw, **changed}.items() if value is not None}
        path.write_bytes(header(metadata, self.tensors, 32) + self.data)


def read_source(path: Path) -> Source:
    with open_model(path) as file:
        weights, data, tensors = Weights(file, np.float32), b"", []
        for name, info in file.tensors.items():
            raw = np.ascontiguousarray(weights[name], np.float32).tobytes()
            tensors.append((name, "F32", info.shape))
            data += raw + padding(len(raw), 32)
        raw = {key: file.value_bytes(key) for key in file.metadata}
        metadata = {key: plain(value) for key, value in file.metadata.items()}
        return Source(
            path.name.removesuffix(".gguf"), file.metadata["general.architecture"], metadata, raw, tensors, data
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


def changes(key: str, value: Any, raw: bytes) -> Iterator[tuple[str, bytes | None]]:
    """What is done to a key that the file has, and the value that it gets."""
    yield "dropped", None
    if key in CHOICES:
        for choice in CHOICES[key]:
            yield f"= {choice!r}", typed(choice if isinstance(choice, str) else U(choice))
        return
    if isinstance(value, str):
        return
    code = next(
        code for code, i in _CODES.items() if i == int.from_bytes(raw[:4] if raw[0] != ARRAY else raw[4:8], "little")
    )
    array = np.array(value, code)
    others = [~array] if code == bool else [array * 0, array * 2, (array / 2).astype(code)]
    for other in others:
        yield f"= {other.tolist()}", typed(other)
    if array.ndim:
        for other in (array[:-1], array.astype("u4").flat[0]):
            yield f"= {other.tolist()}", typed(other)
    elif code != bool and key.startswith("attention.head_count"):
        yield "= [array]", typed(np.array([value] * 8, code))


def variants(source: Source) -> Iterator[tuple[str, str, dict[str, bytes | None]]]:
    """Key, what is done to it, and the change, for all variants of one model."""
    prefix = source.architecture + "."
    have = {name.removeprefix(prefix) for name in source.metadata if name.startswith(prefix)}
    for key in sorted(have - set(SAME)):
        for what, raw in changes(key, source.metadata[prefix + key], source.raw[prefix + key]):
            if raw != source.raw[prefix + key]:
                yield key, what, {prefix + key: raw}
    for key in sorted(set(ADDED) - have):
        for value in ADDED[key]:
            shown = value.item() if isinstance(value, np.generic) else value
            yield key, f"added {shown!r}", {prefix + key: typed(value)}


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


def verdict(ours: np.ndarray | str, theirs: np.ndarray | str, allowed: float) -> tuple[str, float | None]:
    if isinstance(ours, str) or isinstance(theirs, str):
        both = isinstance(ours, str) and isinstance(theirs, str)
        return ("both refuse" if both else "refused" if isinstance(ours, str) else "alone"), None
    if ours.shape != theirs.shape:
        return "WRONG", float("inf")
    if not np.isfinite(theirs).all():
        return ("agree" if not np.isfinite(ours).all() else "alone"), None
    error = float(np.nan_to_num(np.abs(ours - theirs), nan=np.inf).max())
    return ("agree" if error <= allowed * max(1.0, float(theirs.std())) else "WRONG"), error


def sweep(source: Source, llama: Llama, folder: Path) -> Iterator[dict[str, Any]]:
    """A record a variant; the model as it is comes first."""
    path, allowed = folder / "variant.gguf", 1e-3
    for key, what, changed in [("", "as it is", {}), *variants(source)]:
        source.write(path, changed)
        ours, said = reference(path)
        answer = llama.logits(path, TOKENS)
        theirs = answer if isinstance(answer, str) else np.frombuffer(answer, np.float32).reshape(len(TOKENS), -1)
        judged, error = verdict(ours, theirs, allowed)
        if not key and source.architecture == "gemma4" and error is not None:
            judged, allowed = "agree", max(allowed, 3 * error)  # this build looks its GELU up in half precision
        yield {
            "model": source.name, "key": key, "change": what, "verdict": judged, "error": error, "warning": said,
            "ours": ours if isinstance(ours, str) else "", "llama.cpp": theirs if isinstance(theirs, str) else "",
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.gguf", help="default: the reference sets")
    parser.add_argument("--llama-python", required=True, help="a Python that has xllamacpp")
    parser.add_argument("--key", help="only variants of keys that hold this text")
    parser.add_argument("--write", type=Path, help="all records as JSON")
    args = parser.parse_args()
    models = args.models or [path for folder in MODELS for path in sorted(folder.glob("*.gguf"))]
    records = []
    with Llama(args.llama_python) as llama, tempfile.TemporaryDirectory() as folder:
        for path in models:
            for record in sweep(read_source(path), llama, Path(folder)):
                if args.key and args.key not in record["key"]:
                    continue
                records.append(record)
                if record["verdict"] != "agree":
                    print("  ".join(str(record[name]) for name in record if record[name] not in ("", None)), flush=True)
    if args.write:
        args.write.write_text(json.dumps(records, indent=0))
    counts = Counter(record["verdict"] for record in records)
    print(f"{len(records)} variants of {len(models)} models:", ", ".join(f"{n} {v}" for v, n in counts.most_common()))
    return int(counts["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
