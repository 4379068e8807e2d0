"""Which of two devices each tensor of a model lies on, by the planner's rules, and who computes what because of it.

A matrix is multiplied with where it lies. The other work of a layer, and what it keeps of the past, is at the layer's
*home*, where ``-ngl`` puts it. The three matrices of an expert lie on one device. A vector (the weight of a norm, a
bias) lies where the rules put it; an op of the other device that needs it has a copy. Rows of the embedding are looked
up in host memory, so nothing is computed there for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_cupy.device.base import Device
from moe_cupy.plan.rules import CPU, GPU, Override, Placement, gpu_layers, parse_overrides, place
from moe_cupy.plan.shapes import from_file
from moe_cupy.plan.tables import PlanError
from moe_cupy.store import MATRICES
from moe_ref.tensors import View

EMBEDDING = "token_embd.weight"
Views = Mapping[str, View]


@dataclass(frozen=True)
class Split:
    """Devices by the names of the planner, and what is where. With ``placement`` None there is one device."""

    devices: dict[str, Device]  # GPU and, if it computes anything, CPU; or CPU alone
    homes: tuple[str, ...]  # of each layer, and of the output
    experts: tuple[str, ...]  # where the routed experts of each layer are computed
    placement: Placement | None = None
    n_gpu_layers: int = 0  # the output counts as one
    why: dict[str, str] = field(default_factory=dict)  # stored tensor -> the rule that put it where it is

    @classmethod
    def whole(cls, device: Device, layers: int) -> Split:
        """Everything on one device, whose memory is the host's."""
        return cls({CPU: device}, (CPU,) * (layers + 1), (CPU,) * layers)

    def place(self, stored: str) -> str:
        """The device of a tensor of the file."""
        return CPU if self.placement is None else self.placement.device.get(stored, CPU)

    def upload(self, raw: np.ndarray, at: str) -> Any:
        """The bytes of ``raw`` in the memory of ``at``, uint8."""
        device = self.devices.get(at)
        return np.ascontiguousarray(raw).reshape(-1).view(np.uint8) if device is None else device.upload(raw)

    def looked_up(self, name: str) -> bool:
        """Whether a tensor is the embedding in host memory, before a device with memory of its own."""
        return name == EMBEDDING and GPU in self.devices and self.place(EMBEDDING) == CPU

    @property
    def main(self) -> str:
        """The device that was asked for."""
        return GPU if GPU in self.devices else CPU

    @property
    def is_divided(self) -> bool:
        """Whether both devices compute."""
        return len(self.devices) > 1

    def layers_of_experts(self, at: str) -> list[int]:
        """Layers whose routed experts ``at`` computes, whether they have any or not."""
        return [layer for layer, there in enumerate(self.experts) if there == at]


def split_model(file: Any, views: Views, device: Device, ngl: str | int | None, overrides: Sequence[Override] | str,
                host: Callable[[], Device]) -> Split:  # fmt: skip
    """Where ``-ngl`` and the overrides put the tensors of an open file; ``host`` makes the CPU's device if needed.

    Raises PlanError for flags that cannot be read, and for a division that the runtime cannot carry out.
    """
    model = from_file(file)
    rules = parse_overrides(overrides) if isinstance(overrides, str) else list(overrides)
    n_gpu_layers = gpu_layers(None if ngl is None else str(ngl), model.layers, model.layers_behind)
    if device.is_unified:
        return Split.whole(device, model.layers)
    placed = place(model, n_gpu_layers, rules)
    homes = (*placed.pasts, GPU if n_gpu_layers else CPU)
    experts = tuple(_experts_of(placed, views, layer, homes[layer]) for layer in range(model.layers))
    devices = {GPU: device}
    if any(at == CPU for name, at in placed.device.items() if name != EMBEDDING):
        devices[CPU] = host()
    return Split(devices, homes, experts, placed, n_gpu_layers, placed.reason)


def _experts_of(placed: Placement, views: Views, layer: int, home: str) -> str:
    """Where a layer's routed experts are computed; its home if it has none. Raises PlanError if they are divided."""
    names = [views[name].stored.name for m in MATRICES if (name := f"blk.{layer}.ffn_{m}_exps.weight") in views]
    places = {placed.device[name]: name for name in reversed(names)}
    if len(places) > 1:
        said = ", ".join(f"{name} on {at} ({placed.reason[name]})" for at, name in places.items())
        raise PlanError(
            f"{said}: one device has to have all the matrices of a layer's routed experts; move them together, "
            rf"such as -ot 'blk\.{layer}\.ffn_.*_exps=CPU'"
        )
    return next(iter(places), home)


def second_device(options: Any) -> Device:
    """The CPU, for a model that is divided between it and a device with memory of its own. Raises PlanError."""
    from moe_cupy.device.host import HostDevice

    if options.decode == "device":
        raise PlanError("--decode device runs whole tokens on the GPU, but -ngl, -ot, --cpu-moe or --n-cpu-moe keep a "
                        "part of the model on the CPU; use --decode host, or leave those out")  # fmt: skip
    return HostDevice(options.threads, options.act)


def idle_threads(options: Any, split: Split) -> str:
    """That -t does nothing where the CPU computes nothing, as the end of a sentence."""
    idle = options.threads and CPU not in split.devices
    return f"; -t {options.threads} has no effect: the CPU computes nothing" if idle else ""


def without_effect(options: Any, device: Device) -> str:
    """What of the flags does nothing on a device whose memory is the host's, as the end of a sentence."""
    flags = [f"--host-cache {options.host_cache}"] if options.host_cache != "auto" else []
    flags += [f"-ngl {options.n_gpu_layers}"] if options.n_gpu_layers not in (None, "auto") else []
    flags += dict.fromkeys(getattr(rule, "flag", "-ot") for rule in options.overrides or ())
    if not flags or not device.is_unified:
        return ""
    verb = "has" if len(flags) == 1 else "have"
    return f"; the {device.name} device has one memory: {', '.join(flags)} {verb} no effect"
