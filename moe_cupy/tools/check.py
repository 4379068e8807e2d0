"""``check``: every op against its reference, then whole models against ``moe_ref``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_cupy.device.base import Device
from moe_cupy.kernels.cases import Case, all_cases
from moe_cupy.kernels.host.matmul import SUPPORTED
from moe_cupy.kernels.matrix import Matrix
from moe_cupy.kernels.table import OPS
from moe_ref.console import with_progress
from moe_ref.generation import shown_logits
from moe_ref.model import Model

FINER = 1.2  # blocks of 32 change at most so many times what llama.cpp's CPU kernels change by blocks of 32 to 256
SHARE_OF_ROUNDING = 0.25  # of what rounding activations changes (latent attention is taken apart in float32)
WHOLE_MODEL_TOLERANCE = 1e-3  # times max(1, std of the logits), as for the reference against llama.cpp


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row of the table: how far off, as a share of what is allowed."""

    name: str
    cases: int
    worst: float  # error / tolerance; exact matches where the tolerance is 0 count as 0
    where: str

    @property
    def passed(self) -> bool:
        """Whether every case stayed within its tolerance."""
        return self.worst <= 1


def _copy(buffers: dict[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in buffers.items()}


def _wide(buffers: dict[str, Any], outputs: tuple[str, ...]) -> dict[str, Any]:
    """Float32 outputs become float64, so that the reference is not rounded before it is compared."""
    return {
        name: value.astype(np.float64) if name in outputs and value.dtype == np.float32 else value
        for name, value in _copy(buffers).items()
    }


def error_over_tolerance(case: Case, device: Device) -> float:
    """Run a case on the device and in the reference; the worst element's error as a share of its bound."""
    got, want = _copy(case.buffers), _wide(case.buffers, case.outputs)
    OPS[case.op].reference(**want)
    launch_on(device, case.op, got, case.outputs)
    if any(not np.array_equal(got[name], case.buffers[name], equal_nan=True) for name in _inputs(case)):
        return float("inf")  # an op that writes into what it reads
    allowed = case.allowed()
    return max(_ratio(got[name], want[name], allowed[name]) for name in case.outputs)


def launch_on(device: Device, op: str, buffers: dict[str, Any], outputs: tuple[str, ...]) -> None:
    """Run an op on host arrays, which get the result, whatever memory the device has."""
    stream = device.stream("check")
    if device.is_unified:
        device.launch(op, stream, **buffers)
        device.synchronize()
        return
    sent = {name: value if name == "wanted" else _sent(device, value) for name, value in buffers.items()}
    extra = {"on_host": buffers["ids"]} if "wanted" in buffers else {}
    device.launch(op, stream, **sent, **extra)
    arrays = [name for name, value in buffers.items() if isinstance(value, np.ndarray) and name != "wanted"]
    fetched = {name: device.fetch(name, sent[name], stream) for name in arrays}
    stream.record().synchronize()
    for name in arrays:
        buffers[name][...] = fetched[name]


def _sent(device: Device, value: Any) -> Any:
    """A buffer in device memory, those inside it too."""
    if isinstance(value, np.ndarray):
        return device.upload(value).view(value.dtype).reshape(value.shape)
    if isinstance(value, Matrix):
        return Matrix(value.type, value.rows, value.cols, device.upload(value.data))
    if isinstance(value, dict):
        return {name: _sent(device, one) for name, one in value.items()}
    return [_sent(device, one) for one in value] if isinstance(value, list) else value


def _inputs(case: Case) -> list[str]:
    """Array buffers that an op must leave alone."""
    return [n for n, value in case.buffers.items() if isinstance(value, np.ndarray) and n not in case.outputs]


def _ratio(got: np.ndarray, want: np.ndarray, allowed: np.ndarray | float) -> float:
    exact = want.astype(got.dtype) if np.isscalar(allowed) and allowed == 0 else want
    error = np.abs(got.astype(np.float64) - exact.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0.0, error / allowed)
    return float("inf") if np.isnan(ratio).any() else float(ratio.max())


def check_ops(device: Device, formats: tuple[str, ...] = SUPPORTED, seed: int = 0) -> Iterator[Outcome]:
    """One outcome an op, over all cases and formats."""
    rows: dict[str, list[tuple[float, str]]] = defaultdict(list)
    cases = list(all_cases(formats, seed))
    for case in with_progress(cases, "kernels", len(cases)):
        rows[case.op].append((error_over_tolerance(case, device), case.label))
    for op, results in rows.items():
        worst, where = max(results)
        yield Outcome(op, len(results), worst, where)


def compare_logits(name: str, got: np.ndarray, want: np.ndarray) -> Outcome:
    """Whole-model logits [T, vocab]: within tolerance and the same top-1 at every position."""
    allowed = WHOLE_MODEL_TOLERANCE * max(1.0, float(want.std()))
    error = np.abs(got - want).max(axis=1)
    differs = got.argmax(axis=1) != want.argmax(axis=1)
    worst = float("inf") if differs.any() else float(error.max()) / allowed
    return Outcome(name, len(want), worst, f"position {int(error.argmax())}: {error.max():.1e} of {allowed:.1e}")


def check_model(engine: Any, tokens: np.ndarray) -> Iterator[Outcome]:
    """The engine against ``moe_ref`` on the same file: in one pass, and token by token."""
    got = engine.logits(tokens)
    engine.reset()
    steps = np.stack([engine.decode(int(token)).copy() for token in tokens])
    if engine.options.act == "f32":
        want = shown_logits(Model(engine.file), tokens)
        yield compare_logits("model, one pass", got, want)
        yield compare_logits("model, by token", steps, want)
    else:
        yield (compare_logits if engine.device.is_unified else compare_medians)("by token, in one", steps, got)
        yield compare_rounded(engine, tokens)


def compare_medians(name: str, got: np.ndarray, want: np.ndarray) -> Outcome:
    """Where sums of few tokens and of many are added in different orders, a number next to a half may be rounded
    the other way, and all behind it differs: so it is the median that has to be within tolerance."""
    error, allowed = float(np.median(np.abs(got - want))), WHOLE_MODEL_TOLERANCE * max(1.0, float(want.std()))
    return Outcome(name, len(want), error / allowed, f"median {error:.1e} of {allowed:.1e}")


def compare_rounded(engine: Any, tokens: np.ndarray) -> Outcome:
    """Rounded activations: tokens, each a sequence of its own, against ``moe_ref`` with the same rounding.

    Where a number lies next to a half, the last bit of a sum decides over a step, and all behind it differs. So it is
    the median that is compared: it may be off by a quarter of what rounding changes. Devices with memory of their own
    round blocks of 32 whatever the type: they may be off the exact result by a little more than ``moe_ref`` is.
    """
    alone = np.stack([engine.logits([token])[0] for token in tokens])
    rounded, exact = (
        np.stack([model.logits(np.array([token]))[0] for token in tokens])
        for model in (Model(engine.file, act="q8"), Model(engine.file))
    )
    same_blocks = engine.device.is_unified
    error = np.median(np.abs(alone - (rounded if same_blocks else exact)))
    effect = np.median(np.abs(exact - rounded))
    allowed = (SHARE_OF_ROUNDING if same_blocks else FINER) * effect
    worst = float(error / allowed) if allowed else float(error > 0)
    return Outcome("model, rounded", len(tokens), worst, f"median {error:.1e}; rounding changes {effect:.1e}")


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a table."""
    lines = [f"{'what':18} {'cases':>5}  {'error/tolerance':>15}  result  worst case"]
    lines += [
        f"{o.name:18} {o.cases:>5}  {o.worst:>15.3g}  {'ok    ' if o.passed else 'WRONG '}  {o.where}" for o in outcomes
    ]
    return "\n".join(lines)
