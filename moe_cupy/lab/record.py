"""A trace from a run: collects what each layer's router decided, pass by pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_cupy.lab.trace import GENERATED, PROMPT, RouteTrace, TraceError
from moe_cupy.plan.shapes import from_file
from moe_ref.attention import softmax
from moe_ref.model import Model


class Recorder:
    """Layers are told in order, each once a pass over T tokens; ``end_pass`` closes it."""

    def __init__(self, n_experts: int, keep_router: bool = False):
        self.n_experts, self.keep_router = n_experts, keep_router
        self.layer_ids: list[int] = []
        self._pass: dict[str, list[np.ndarray]] = {}
        self._done: dict[str, list[np.ndarray]] = {}
        self._phase: list[int] = []
        self._starts: list[int] = []

    def begin_sequence(self) -> None:
        """What follows belongs to a new sequence."""
        if not self._starts or self._starts[-1] != len(self._phase):
            self._starts.append(len(self._phase))

    def layer(self, index: int, **arrays: np.ndarray | None) -> None:
        """One layer of the pass: ``experts`` [T, k]; optional ``weights`` and ``ahead`` [T, k], ``router`` [T, E]."""
        if not self._done and index not in self.layer_ids:
            self.layer_ids.append(index)
        for name, array in arrays.items():
            if array is not None and (name != "router" or self.keep_router):
                self._pass.setdefault(name, []).append(np.array(array))

    def end_pass(self, generated: bool) -> None:
        """The pass is over; its tokens are part of the prompt or generated."""
        for name, layers in self._pass.items():
            self._done.setdefault(name, []).append(np.stack(layers, axis=1))  # L x [T, .] -> [T, L, .]
        count = len(self._pass["experts"][0])
        self._phase += [GENERATED if generated else PROMPT] * count
        self._pass = {}

    def trace(self, **meta: Any) -> RouteTrace:
        """Everything so far."""
        if not self._phase:
            raise TraceError("nothing was recorded: the model has no routed experts, or no token was run")
        arrays = {name: np.concatenate(parts) for name, parts in self._done.items()}
        starts = np.array(self._starts or [0], np.int64)
        about = {"layer_ids": self.layer_ids, "weights_descending": True} | meta
        return RouteTrace(
            arrays["experts"], self.n_experts, starts, about, arrays.get("weights"), arrays.get("router"),
            arrays.get("ahead"), np.array(self._phase, np.uint8),
        )  # fmt: skip


def record_reference(model: Model, sequences: Sequence[tuple[Sequence[int], int]], keep_router: bool) -> RouteTrace:
    """Routes of ``moe_ref`` on (prompt ids, tokens to generate greedily) pairs; prompts in one pass each."""
    recorder = Recorder(model.config.expert_count, keep_router)
    seen: dict[str, np.ndarray] = {}

    def observe(name: str, array: np.ndarray) -> None:
        kind, _, layer = name.rpartition("-")
        seen[kind] = array
        if kind == "ffn_moe_weights":
            router = softmax(seen["ffn_moe_logits"]) if keep_router else None
            recorder.layer(int(layer), experts=seen["ffn_moe_topk"], weights=array, router=router)

    model.observe = observe
    for prompt, count in sequences:
        recorder.begin_sequence()
        cache, ids = model.new_cache(), list(prompt)
        for step in range(count + 1):
            logits = model.forward(ids, cache)
            recorder.end_pass(generated=step > 0)
            ids = [int(logits[-1].argmax())]
    return recorder.trace(source="moe_ref", model=Path(model.file.path).name, **expert_bytes_in(model.file))


def expert_bytes_in(file: Any) -> dict[str, int]:
    """What a trace keeps of an open file's routed experts: the bytes of one, on average over the layers."""
    nbytes = from_file(file).expert_bytes
    return {"expert_bytes": round(nbytes)} if nbytes else {}
