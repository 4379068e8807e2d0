"""Which device each tensor goes to, by llama.cpp's flags and in llama.cpp's order.

``-ngl N`` puts the last N layers on the GPU, the output counted as one of them; the embedding stays in host memory.
Overrides come on top, in the order of the command line: the first whose pattern is found in a tensor's name decides.
Source: ``common/arg.cpp``, ``src/llama-model.cpp`` and ``src/llama-model-loader.cpp`` of llama.cpp 0.5.0-dev.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from moe_cupy.plan.regex import PatternError, compile_pattern
from moe_cupy.plan.shapes import Model, Tensor
from moe_cupy.plan.tables import PlanError

CPU, GPU = "CPU", "CUDA0"
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
DENSE_FFN = r"\.ffn_(up|down|gate)\."
LAYERS_AUTO, LAYERS_ALL = "auto", "all"


@dataclass(frozen=True, slots=True)
class Override:
    """One rule: tensors in whose name ``pattern`` is found go to ``device``."""

    pattern: str
    device: str
    flag: str  # which flag it came from

    def found_in(self, name: str) -> bool:
        return compile_pattern(self.pattern).search(name) is not None


def parse_overrides(text: str, devices: Sequence[str] = (CPU, GPU)) -> list[Override]:
    """``REGEX=DEVICE,…``. Raises PlanError for what llama.cpp would refuse.

    As there, a comma always ends a rule and the first "=" ends its pattern, so neither can be part of one.
    """
    rules = []
    for part in text.split(","):
        pattern, equals, device = part.partition("=")
        if not equals:
            raise PlanError(f"-ot {part!r}: expected REGEX=DEVICE, such as exps=CPU"
                            + (" (a comma ends a rule, even inside {…})" if "," in text else ""))  # fmt: skip
        if device not in devices:
            close = next((d for d in devices if d.lower() == device.lower()), None)
            hint = f"did you mean {close}? " if close else ""
            raise PlanError(f"-ot {part}: there is no device {device!r}; {hint}devices: {', '.join(devices)}")
        try:
            compile_pattern(pattern)
        except PatternError as error:
            raise PlanError(f"-ot {part}: {pattern!r} is no pattern of llama.cpp's: {error}") from error
        rules.append(Override(pattern, device, "-ot"))
    return rules


def cpu_moe() -> list[Override]:
    """``--cpu-moe``: all routed experts in host memory."""
    return [Override(EXPERTS, CPU, "--cpu-moe")]


def n_cpu_moe(count: int) -> list[Override]:
    """``--n-cpu-moe N``: those of blk.0 … blk.N-1, dense layers counted."""
    return [Override(rf"blk\.{i}{EXPERTS}", CPU, "--n-cpu-moe") for i in range(count)]


def n_cpu_ffn(count: int) -> list[Override]:
    """``--n-cpu-ffn N``: dense networks of the first N layers."""
    return [Override(rf"blk\.{i}{DENSE_FFN}", CPU, "--n-cpu-ffn") for i in range(count)]


def gpu_layers(text: str | None, layers: int, behind: int = 0) -> int:
    """``-ngl`` as a number, at most ``layers`` and the output. Raises PlanError for what is none.

    llama.cpp counts the ``behind`` layers that a file has behind the trunk (nextn) too, next after the output.
    """
    if text in (None, LAYERS_AUTO, LAYERS_ALL):
        return layers + 1
    if not re.fullmatch(r"-?\d{1,9}", str(text)):
        raise PlanError(f"-ngl {text}: expected a number of layers, 'auto' or 'all'")
    count = int(str(text))
    return layers + 1 if count < 0 else min(max(count - behind, min(count, 1)), layers + 1)


@dataclass(frozen=True)
class Placement:
    """Tensor name -> device, why, and the devices of each layer's past and of the layer."""

    device: dict[str, str]
    reason: dict[str, str]
    pasts: tuple[str, ...]
    homes: tuple[str, ...]  # of each layer by -ngl; where its kernels run
    tied_copy: bool  # the embedding is the output too, and a second copy of it is on the GPU

    def on(self, device: str, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [t for t in tensors if self.device[t.name] == device]


@lru_cache(maxsize=256)
def first_rules(overrides: tuple[Override, ...], names: tuple[str, ...]) -> tuple[Override | None, ...]:
    """For each name the first rule that finds its pattern in it."""
    compiled = [(compile_pattern(rule.pattern), rule) for rule in overrides]
    return tuple(next((rule for pattern, rule in compiled if pattern.search(name)), None) for name in names)


def place(model: Model, ngl: int, overrides: Sequence[Override], gpu: str | None = GPU,
          kv_on_host: bool = False) -> Placement:  # fmt: skip
    """Where ``-ngl`` and the overrides put each tensor; without a GPU everything is in host memory."""
    device, reason = {}, {}
    first = model.layers + 1 - ngl
    rules = first_rules(tuple(overrides), tuple(t.name for t in model.tensors))
    for tensor, rule in zip(model.tensors, rules, strict=True):
        name = tensor.name
        if rule is not None:
            device[name], reason[name] = rule.device, f"{rule.flag} {rule.pattern}={rule.device}"
        elif gpu and _index(tensor, model.layers) >= first:
            device[name], reason[name] = gpu, f"-ngl {ngl}"
        else:
            device[name], reason[name] = CPU, "the input" if name == "token_embd.weight" else f"-ngl {ngl}"
        if gpu is None:
            device[name] = CPU
    homes = tuple(gpu if gpu and i >= first else CPU for i in range(model.layers))
    pasts = (CPU,) * model.layers if kv_on_host else homes
    has_output = any(t.part == "output" for t in model.tensors)
    return Placement(device, reason, pasts, homes, tied_copy=bool(gpu and ngl > 0 and not has_output))


def _index(tensor: Tensor, layers: int) -> int:
    """The layer that ``-ngl`` counts a tensor to: the input is before all, the output behind all."""
    if tensor.layer is not None:
        return tensor.layer
    return -1 if tensor.name in ("token_embd.weight", "per_layer_token_embd.weight") else layers
