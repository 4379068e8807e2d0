"""A model as the planner sees it: tensors with names, types and bytes, and what each layer keeps of the past."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from types import SimpleNamespace
from typing import Any

from moe_cupy.plan.mixes import PARTS, UNQUANTIZED, Facts, layer_of, mix_called, types_of
from moe_cupy.plan.names import known_as
from moe_cupy.plan.tables import PlanError, flat, table
from moe_ref.config import ModelConfig, load_config
from moe_ref.quants import BY_NAME
from moe_ref.tensors import expected_shapes

ROUTED = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps")  # llama.cpp's pattern for --cpu-moe
SHARED = re.compile(r"_shexp\.")
EPSILON = "attention.layer_norm_rms_epsilon"  # must be there; no byte depends on it
NOT_KEYS = ("source", "note", "also", "architecture", "vocab_size", "parameters", "optional", "tied", "native_quant")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file; ``shape`` in NumPy order."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    @property
    def part(self) -> str:
        """One of "routed", "shared", "embedding", "output", "dense"."""
        return part_of(self.name, len(self.shape))


@lru_cache(maxsize=1 << 16)
def part_of(name: str, dimensions: int) -> str:
    """What a tensor counts as, by its name."""
    if ROUTED.search(name):
        return "routed" if dimensions == 3 else "dense"
    if SHARED.search(name):
        return "shared"
    return {"token_embd.weight": "embedding", "output.weight": "output"}.get(name, "dense")


@dataclass(frozen=True, slots=True)
class Past:
    """What a layer keeps of the tokens before: numbers a position for keys and values, or a state of fixed size."""

    mixer: str  # "gqa", "mla", "delta"
    keys: int = 0
    values: int = 0
    window: int = 0  # positions kept; 0: all
    state_bytes: int = 0


@dataclass(frozen=True)
class Model:
    """A model's shape. Nothing here is weights."""

    name: str
    quant: str
    tensors: tuple[Tensor, ...]
    pasts: tuple[Past, ...]  # one a layer
    embedding_length: int
    context_length: int
    vocab_size: int
    expert_count: int
    expert_used_count: int
    architecture: str = ""
    source: str = ""
    remarks: tuple[str, ...] = field(default=())
    file: str = ""  # what a command calls it, where that is known
    repository: tuple[str, ...] = ()  # the flags that name it instead, as -hf OWNER/NAME:QUANT
    layers_behind: int = 0  # of the file, behind the trunk (nextn): not run, but counted by -ngl

    @cached_property
    def layers(self) -> int:
        return len(self.pasts)

    @cached_property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def parameters(self) -> int:
        return sum(prod(t.shape) for t in self.tensors)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(sorted({t.layer for t in self.tensors if t.part == "routed" and t.layer is not None}))

    @cached_property
    def routed_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors if t.part == "routed")

    @property
    def experts(self) -> int:
        """Routed experts of all layers."""
        return self.expert_count * len(self.moe_layers)

    @property
    def expert_bytes(self) -> float:
        """Bytes of one routed expert, on average over the layers."""
        return self.routed_bytes / self.experts if self.experts else 0.0

    @cached_property
    def tied_bytes(self) -> int:
        """Of an embedding that is the output matrix too; 0 where the output has its own."""
        return 0 if any(t.part == "output" for t in self.tensors) else self.bytes_of("embedding")

    @property
    def used_share(self) -> float:
        """Of a layer's routed experts, how many a token uses."""
        return self.expert_used_count / self.expert_count if self.expert_count else 0.0

    def bytes_of(self, part: str) -> int:
        return sum(t.nbytes for t in self.tensors if t.part == part)

    def read_per_token(self, tensor: Tensor) -> float:
        """Bytes of a tensor that computing one token reads; of the embedding a row, even where it is the output too."""
        if tensor.part == "routed":
            return tensor.nbytes * self.used_share
        if tensor.part == "embedding":
            return tensor.nbytes / tensor.shape[0]
        return tensor.nbytes


def preset(name: str, quant: str | None = None) -> Model:
    """A named model in a quantization. Raises PlanError listing the nearest for an unknown name of either."""
    row = _row(name := known_as(name))
    mix, remark = mix_called(quant or row.get("native_quant", "Q4_K_M"))
    keys = {f"{row['architecture']}.{key}": value for key, value in row.items() if key not in NOT_KEYS}
    keys |= {"general.architecture": row["architecture"], f"{row['architecture']}.{EPSILON}": 1e-6}
    config = load_config(keys, row["vocab_size"])
    shapes = preset_shapes(config, row)
    types = types_of(shapes, mix, facts_of(config, shapes))
    remarks = [remark, remark_on_native(name, row, mix)]
    return Model(
        name=name.lower(), quant=(quant or mix).upper(), tensors=tensors_of(shapes, types), pasts=pasts_of(config),
        embedding_length=config.embedding_length, context_length=config.context_length, vocab_size=config.vocab_size,
        expert_count=config.expert_count, expert_used_count=config.expert_used_count,
        architecture=config.architecture, source=row["source"], remarks=tuple(filter(None, remarks)),
    )  # fmt: skip


def remark_on_native(name: str, row: Mapping[str, Any], mix: str) -> str:
    native = row.get("native_quant", mix)
    if native == mix or mix in UNQUANTIZED:
        return ""
    return f"{name} was trained in {native}: a {mix} file is hardly smaller, and none is usually published"


def _row(name: str) -> dict[str, Any]:
    models = table("models")
    known = {key.lower(): key for key in models}
    if name.lower() not in known:
        raise PlanError(f"{name}: no preset; presets: {', '.join(sorted(known))}")
    row = models[known[name.lower()]]
    return flat(models[row["same_as"]] | {"source": row["source"]} if "same_as" in row else row)


def preset_shapes(config: ModelConfig, row: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a preset: what its architecture must have, and of the rest what ``optional`` names."""
    widths: Any = SimpleNamespace(path="preset", tensors=_widths(config, row))
    optional = [re.compile(rf"(^|\.){pattern}$") for pattern in row.get("optional", ())]
    if not row.get("tied", False):
        optional.append(re.compile(r"^output\.weight$"))
    shapes = {}
    for marked, shape in expected_shapes(config, widths).items():
        name = marked.removesuffix("?")
        if name == marked or any(pattern.search(name) for pattern in optional):
            shapes[name] = shape
    return shapes


def _widths(config: ModelConfig, row: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors by which a file states how wide its networks are."""

    def matrix(inner: str) -> Any:
        return SimpleNamespace(shape=(row.get(inner, 0), config.embedding_length))

    found: dict[str, Any] = {}
    for layer in config.layers:
        block = f"blk.{layer.index}."
        found[block + "ffn_up.weight"] = matrix("feed_forward_length")
        found[block + "ffn_up_shexp.weight"] = matrix("expert_shared_feed_forward_length")
        wide = row.get("expert_feed_forward_length", 0)
        found[block + "ffn_down_exps.weight"] = SimpleNamespace(shape=(1, config.embedding_length, wide))
    return found


def facts_of(config: ModelConfig, shapes: Mapping[str, Any]) -> Facts:
    first = config.layers[0]

    def ordered(pattern: str) -> tuple[str, ...]:
        return tuple(sorted((n for n in shapes if re.search(pattern, n)), key=lambda n: (layer_of(n) or 0, n)))

    return Facts(
        experts=config.expert_count,
        queries_per_key=first.head_count // first.head_count_kv,
        layers=config.block_count,
        tied="output.weight" not in shapes,
        values=ordered(PARTS["value"]),
        downs=ordered(PARTS["down"] + r".*weight"),
    )


def tensors_of(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> tuple[Tensor, ...]:
    made = []
    for name, shape in shapes.items():
        nbytes = BY_NAME[types[name]].row_bytes(shape[-1]) * prod(shape[:-1])
        made.append(Tensor(name, shape, types[name], nbytes))
    return tuple(made)


def pasts_of(config: ModelConfig) -> tuple[Past, ...]:
    """What each layer keeps: k and v heads; MLA's one vector and rotated key; a delta net's state, in float32."""
    pasts = []
    for layer in config.layers:
        if layer.mixer == "mla" and config.mla is not None and layer.rope is not None:
            pasts.append(Past("mla", keys=config.mla.kv_lora_rank + layer.rope.n_rot))
        elif layer.mixer == "delta" and config.delta is not None:
            d = config.delta
            window = (d.conv_kernel - 1) * (2 * d.key_width + d.value_width)
            pasts.append(Past("delta", state_bytes=4 * (window + d.time_step_rank * d.state_size**2)))
        else:
            heads = layer.head_count_kv
            pasts.append(Past("gqa", heads * layer.key_length, heads * layer.value_length, layer.window))
    return tuple(pasts)


def from_file(file: Any) -> Model:
    """The model of an open GGUF file, of all the parts of a split one; ``file`` is what ``moe_ref.split`` opens.

    A file of an architecture that cannot be run here is planned by its tensors and its plainest keys.
    """
    tensors = tuple(Tensor(t.name, t.shape, t.type, t.nbytes) for t in file.tensors.values())
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise PlanError(f"{file.path}: has no token_embd.weight, so it is no language model (or one part of several); "
                        "plan a model file, or the first part of a split one")  # fmt: skip
    arch = file.get("general.architecture") or ""
    common: dict[str, Any] = dict(
        name=str(file.path), quant=main_type(tensors), tensors=tensors, architecture=arch, source="the file itself",
        vocab_size=embedding.shape[0], embedding_length=embedding.shape[1],
    )  # fmt: skip
    try:
        c = load_config(file.metadata, embedding.shape[0])
    except ValueError as error:
        return _by_keys(file, arch, common, f"read by its keys alone: {error}")
    kept = tuple(t for t in tensors if (t.layer or 0) < c.block_count)
    model = Model(pasts=pasts_of(c), context_length=c.context_length, expert_count=c.expert_count,
                  expert_used_count=c.expert_used_count, layers_behind=c.nextn_predict_layers, **common)  # fmt: skip
    return replace(model, tensors=kept)


def _by_keys(file: Any, arch: str, common: dict[str, Any], remark: str) -> Model:
    def number(key: str, default: int) -> int:
        value = file.get(f"{arch}.{key}")
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default

    layers = len({t.layer for t in common["tensors"] if t.layer is not None})
    heads = number("attention.head_count", 1)
    heads_kv = number("attention.head_count_kv", heads)
    width = number("attention.key_length", common["embedding_length"] // heads)
    past = Past("gqa", heads_kv * width, heads_kv * number("attention.value_length", width))
    return Model(
        pasts=(past,) * layers, context_length=number("context_length", 4096), expert_count=number("expert_count", 0),
        expert_used_count=number("expert_used_count", 0), remarks=(remark,), **common,
    )  # fmt: skip


def main_type(tensors: tuple[Tensor, ...]) -> str:
    """The type that holds most bytes."""
    return next(iter(types_held(tensors)), "none")


def types_held(tensors: tuple[Tensor, ...]) -> dict[str, int]:
    """Bytes of each type, the most first: what a mix is made of."""
    held: dict[str, int] = {}
    for tensor in tensors:
        held[tensor.type] = held.get(tensor.type, 0) + tensor.nbytes
    return dict(sorted(held.items(), key=lambda item: -item[1]))
