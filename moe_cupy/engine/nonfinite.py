"""Where a pass first made a number that is not finite: asked after the fact, so that passes pay nothing for it.

Ops hand NaN and infinity on (``tests/moe_cupy/test_nonfinite_ops.py``), so a look at the logits finds them. Then the
pass is run again, launch by launch, each result looked at; the weights of the first bad one are read from the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from moe_cupy.engine.forward import Forward
from moe_cupy.engine.two_devices import TwoDevices
from moe_cupy.engine.weights import EXPERTS, DenseWeights
from moe_cupy.kernels.kept import numbers_of
from moe_cupy.kernels.table import OPS
from moe_ref.finite import FILE_IS_DAMAGED, OVERFLOW, NonFiniteError, check_finite
from moe_ref.quants import dequantize
from moe_ref.tensors import View
from moe_ref.weights import Weights

KV_REMEDY = "keys or values are too large for the type of the KV cache: use -ctk f32 -ctv f32"
ROUNDED_REMEDY = "rounded activations have a smaller range: use --act f32"
PIECE = 1 << 24  # numbers of a tensor that are decoded at a time


def is_finite(logits: np.ndarray) -> bool:
    """Whether all of logits [..., vocab] are finite; quick where they are."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(logits.sum())) or bool(np.isfinite(logits).all())


def explain(engine: Any, tokens: np.ndarray) -> NonFiniteError:
    """What to raise for an engine's pass over ``tokens`` [T] whose logits are not finite: the pass is repeated."""
    weights = Weights(engine.file, keep_bytes=0, views=engine.views)  # refuses a tensor that is not finite
    halves = engine.forward.halves.values() if isinstance(engine.forward, TwoDevices) else [engine.forward]
    try:
        weights.rows("token_embd.weight", np.unique(tokens))
        with ExitStack() as watching:
            for half in halves:
                watching.enter_context(half.each_launch(partial(Probe, half, weights, engine.options.act)))
            engine.forward(tokens, engine.kv)
    except NonFiniteError as found:
        return found
    return NonFiniteError(f"the logits of {len(tokens)} tokens are not finite (NaN or infinite); {OVERFLOW}")


class Probe:
    """``launch``, and a look at each result. Raises NonFiniteError that names the first one that is not finite."""

    def __init__(self, forward: Forward, weights: Weights, act: str, launch: Callable[..., None]):
        self._forward, self._weights, self._act, self._launch = forward, weights, act, launch
        self._names, self._layer = names_of(forward.weights), ""

    def __call__(self, op: str, **buffers: Any) -> None:
        self._launch(op, **buffers)
        names = [self._names[id(value)] for value in buffers.values() if id(value) in self._names]
        if names:
            self._layer = names[0].split(".")[1] if names[0].startswith("blk.") else ""
        if not all(np.isfinite(result).all() for result in self._results(op, buffers)):
            self._blame_weights(op, names, buffers)
            raise NonFiniteError(self._message(op, names))

    def _results(self, op: str, buffers: Mapping[str, Any]) -> Iterator[np.ndarray]:
        """What the op has written, in host memory, without what lies beside it in the same array."""
        b = buffers
        for name in OPS[op].writes:
            if op == "kv_store":
                yield numbers_of(self._fetch(name, b[name][b["position"] : b["position"] + len(b["new"])]))
                continue
            host = self._fetch(name, b[name])
            if op == "experts":
                ids = b["on_host"] if "on_host" in b else self._fetch("ids", b["ids"])
                host = host[np.isin(ids, b["wanted"])]
            elif op == "linear_heads":
                host = host[..., : b["w"].rows // b["x"].shape[1]]
            elif op == "columns":
                host = host[:, b["at"] : b["at"] + b["count"]]
            yield host

    def _fetch(self, name: str, value: Any) -> np.ndarray:
        host = self._forward.device.fetch(f"probed {name}", value, self._forward.stream)
        self._forward.stream.record().synchronize()
        return host

    def _blame_weights(self, op: str, names: list[str], buffers: Mapping[str, Any]) -> None:
        """Raise, with the name of the tensor, if one that the op was given is not finite."""
        for name in names:
            if name in self._weights:
                check_tensor(self._weights, name)
        for expert in sorted(map(int, buffers["wanted"])) if op == "experts" else []:
            for stem in EXPERTS.values():
                self._weights.part(f"blk.{self._layer}.{stem}.weight", expert)

    def _message(self, op: str, names: list[str]) -> str:
        where = f"layer {self._layer}: " if self._layer else ""
        what = f"the product with {names[0]}" if op.startswith("linear") and names else f"the result of '{op}'"
        remedy = KV_REMEDY if op == "kv_store" else ROUNDED_REMEDY if self._act == "q8" else OVERFLOW
        return f"{where}{what} is not finite (NaN or infinite), though the weights are; {remedy}"


def names_of(weights: DenseWeights) -> dict[int, str]:
    """The tensor that a launch is given, by ``id``: matrices, and the weights of norms and vectors."""
    found = {id(weights.output.w): "output.weight"} | {id(weights.token_embd): "token_embd.weight"}
    found[id(weights.output_norm[0])] = "output_norm.weight"
    for index, layer in enumerate(weights.layers):
        found |= {id(linear.w): f"blk.{index}.{stem}.weight" for stem, linear in layer.linears.items()}
        found |= {id(norm[0]): f"blk.{index}.{stem}.weight" for stem, norm in layer.norms.items()}
        found |= {id(vector): f"blk.{index}.{name}" for name, vector in layer.vectors.items()}
    found.pop(id(None), None)
    return found


def check_tensor(weights: Weights, name: str) -> None:
    """Raise NonFiniteError if a tensor of the file is not finite; it is decoded some rows at a time."""
    view: View = weights.views[name]
    if len(view.shape) != 2:
        for index in range(view.shape[0]) if len(view.shape) > 2 else [None]:
            _ = weights[name] if index is None else weights.part(name, index)
        return
    (first, count), (rows, cols) = view.segment(), view.shape
    step = max(1, PIECE // cols)
    for row in range(0, rows, step):
        taken = min(step, rows - row)
        raw = weights.file.read(view.stored.name, first + row * (count // rows), taken * (count // rows))
        with np.errstate(over="ignore", invalid="ignore"):
            values = dequantize(raw, view.stored.type, (taken, cols), name)
        check_finite(values, f"{name}, rows from {row} on", FILE_IS_DAMAGED)
