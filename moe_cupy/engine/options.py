"""How an engine runs: the flags of the command line as one frozen object, checked when it is made."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from moe_cupy.cache import parse_cache
from moe_cupy.cache.tabled import RULES
from moe_cupy.compiled import POLICIES
from moe_cupy.device import CHOICES
from moe_cupy.engine.spelling import python_names
from moe_cupy.plan.rules import Override
from moe_cupy.prefetch import PREFETCHERS

DECIDERS = (*RULES, "echo")  # policies that kernels know
IN_A_GRAPH = ("none", "next-gate")  # predictors that a captured token can hold
DEFAULT_CONTEXT = 4096  # tokens, where neither the caller nor the model asks for less
LARGEST = 2**31 - 1
LONGEST = 60  # characters of a wrong value that an error shows
FIELDS_OF_TEXT = "cache host_cache policy prefetch device cache_type_k cache_type_v act decode".split()
CHOICES_OF: dict[str, Collection[str]] = {
    "policy": POLICIES,
    "prefetch": PREFETCHERS,
    "device": CHOICES,
    "act": ("f32", "q8"),
    "decode": ("host", "device"),
}
BOUNDS = {"threads": (1, LARGEST), "ctx_size": (0, LARGEST), "ubatch_size": (1, LARGEST), "reads_in_flight": (1, 256)}


@dataclass(frozen=True, slots=True)
class Options:
    """How to run; the names and defaults are those of the command line, and the keywords of ``Engine``.

    Raises ValueError that names the field for a value that cannot be.

    >>> Options(cache="25%").policy
    'echo'
    """

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
    store: str | os.PathLike | None = None  # a file that `repack` made of the model, to read experts from
    direct_io: bool = True
    reads_in_flight: int = 4
    act: str = "f32"  # of activations that meet a quantized matrix; "q8" rounds them to 8 bits, several times faster
    decode: str = "host"  # who decides what is loaded: host (any policy) or device (some, a token is one graph)
    n_gpu_layers: str | int | None = None  # llama.cpp's -ngl: the last N layers, the output counted as one
    overrides: str | Sequence[Override] = ()  # its -ot "exps=CPU", or the planner's rules, --cpu-moe's among them
    progress: bool = False  # show on stderr how far loading and prompts are, where they take long

    def __post_init__(self) -> None:
        with python_names():
            for name in FIELDS_OF_TEXT:
                self._check_text(name)
            for name, table in CHOICES_OF.items():
                value = getattr(self, name)
                if value not in table:
                    raise ValueError(f"--{name} {value}: unknown; use one of {', '.join(table)}")
            for name, (least, most) in BOUNDS.items():
                value = getattr(self, name)
                if value is not None or name != "threads":
                    object.__setattr__(self, name, whole_number(f"--{name.replace('_', '-')}", value, least, most))
            self._check_others()
            if self.decode == "device":
                self._check_device_decides()

    def _check_text(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, str):
            example = ", expected text such as '2GiB', '25%', 'slots:48' or 'auto'" if "cache" in name else ""
            raise ValueError(f"{name}: {shown(value)}{example or ', expected text'}")

    def _check_others(self) -> None:
        """Sizes, and values of several types; None stands for the default."""
        for name in ("cache", "host_cache"):
            if (text := getattr(self, name).strip().lower()) != "auto":
                parse_cache(text, f"--{name.replace('_', '-')}")
        for name in ("direct_io", "progress"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name}: {shown(getattr(self, name))}, expected True or False")
        if not isinstance(self.store, str | os.PathLike | None) or self.store == "":
            raise ValueError(f"store: {shown(self.store)}, expected a path")
        ngl = self.n_gpu_layers
        if not isinstance(ngl, str | int | np.integer | None) or isinstance(ngl, bool):
            raise ValueError(f"n_gpu_layers: {shown(ngl)}, expected a whole number, 'auto' or 'all'")
        rules = self.overrides
        if not isinstance(rules, str) and not (
            isinstance(rules, Sequence) and all(isinstance(rule, Override) for rule in rules)
        ):
            raise ValueError(f"overrides: {shown(rules)}, expected text such as 'exps=CPU', or the planner's rules")

    def _check_device_decides(self) -> None:
        for value, able, flag in ((self.policy, DECIDERS, "--policy"), (self.prefetch, IN_A_GRAPH, "--prefetch")):
            if value not in able:
                raise ValueError(
                    f"{flag} {value}: not with --decode device, where a kernel decides; use one of {', '.join(able)}, "
                    f"or --decode host"
                )


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """``value`` as an int, of whatever whole type. Raises ValueError that calls it ``name``."""
    bounds = f"at least {least}" if most is None else f"{least} to {most}"
    fine = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not fine or not least <= int(value) or (most is not None and int(value) > most):  # type: ignore[call-overload]
        raise ValueError(f"{name} {shown(value)}: expected a whole number, {bounds}")
    return int(value)  # type: ignore[call-overload]


def shown(value: object) -> str:
    """A wrong value in an error, however long it is."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
