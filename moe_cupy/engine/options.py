"""How an engine runs: the flags of the command line as one frozen object, checked when it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_cupy.cache.tabled import RULES
from moe_cupy.compiled import POLICIES
from moe_cupy.plan.rules import Override
from moe_cupy.prefetch import PREFETCHERS

DECIDERS = (*RULES, "echo")  # policies that kernels know
IN_A_GRAPH = ("none", "next-gate")  # predictors that a captured token can hold
DEFAULT_CONTEXT = 4096  # tokens, where neither the caller nor the model asks for less


@dataclass(frozen=True, slots=True)
class Options:
    """How to run; the names and defaults are those of the command line."""

    cache: str = "auto"  # 2GiB | 25% | slots:N | auto
    host_cache: str = "auto"  # the same, of experts in page-locked memory before a device with its own
    policy: str = "echo"
    prefetch: str = "none"
    device: str = "auto"
    threads: int | None = None
    ctx_size: int = 0  # 0: the model's, at most DEFAULT_CONTEXT
    ubatch_size: int = 512
    cache_type_k: str = "f32"
    cache_type_v: str = "f32"
    store: str | None = None  # a file that `repack` made of the model, to read experts from
    direct_io: bool = True
    reads_in_flight: int = 4
    act: str = "f32"  # of activations that meet a quantized matrix; "q8" rounds them to 8 bits, several times faster
    decode: str = "host"  # who decides what is loaded: host (any policy) or device (some, a token is one graph)
    n_gpu_layers: str | int | None = None  # llama.cpp's -ngl: the last N layers, the output counted as one
    overrides: str | Sequence[Override] = ()  # its -ot "exps=CPU", or the planner's rules, --cpu-moe's among them
    progress: bool = False  # show on stderr how far loading and prompts are, where they take long

    def __post_init__(self) -> None:
        for value, table, flag in (
            (self.policy, POLICIES, "--policy"),
            (self.prefetch, PREFETCHERS, "--prefetch"),
            (self.act, ("f32", "q8"), "--act"),
            (self.decode, ("host", "device"), "--decode"),
        ):
            if value not in table:
                raise ValueError(f"{flag} {value}: unknown; use one of {', '.join(table)}")
        for name in ("cache", "host_cache"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name}: {getattr(self, name)!r}, expected text such as '2GiB', '25%', 'slots:48' or 'auto'"
                )
        if self.decode == "device":
            self._check_device_decides()
        for name in ("ubatch_size", "reads_in_flight", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is too small; use at least 1")
        if self.ctx_size < 0:
            raise ValueError(f"ctx_size: {self.ctx_size} is negative; 0 takes the model's")

    def _check_device_decides(self) -> None:
        for value, able, flag in ((self.policy, DECIDERS, "--policy"), (self.prefetch, IN_A_GRAPH, "--prefetch")):
            if value not in able:
                raise ValueError(
                    f"{flag} {value}: not with --decode device, where a kernel decides; use one of {', '.join(able)}, "
                    f"or --decode host"
                )
