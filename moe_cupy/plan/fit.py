"""``--fit``: how many layers, how many of their experts and how much context a card holds, dense before sparse.

The order is llama.cpp's (``common/fit.cpp``): nothing changes if all fits; then the context shrinks, if it was left to
us and that is enough; then the dense part of every layer goes to the card; what is left takes the experts of whole
layers. llama.cpp keeps those of the first layers there, ``--n-cpu-moe`` those of the last: the bytes are the same, and
the command is shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moe_cupy.plan.memory import MIB, PAD, Settings, Use, use_of
from moe_cupy.plan.rules import GPU, Placement, cpu_moe, n_cpu_moe, place
from moe_cupy.plan.shapes import Model
from moe_cupy.plan.tables import DoesNotFit

DEFAULT_TARGET = 1024 * MIB  # of the card's memory that stays free
DEFAULT_LEAST_CONTEXT = 4096


@dataclass(frozen=True)
class Fitted:
    """What was chosen; ``n_cpu_moe`` None where no expert had to leave the card."""

    ngl: int
    n_cpu_moe: int | None
    settings: Settings
    placement: Placement
    use: Use
    steps: tuple[str, ...]


def most(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number in low..high that fits, None if not even ``low`` does; fitting is monotone."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def fit(model: Model, budget: int, settings: Settings, ctx_is_set: bool, least_ctx: int) -> Fitted:
    """Fill a card of ``budget`` bytes. Raises PlanError if not even computing does."""
    every = model.layers + 1

    def with_layers(ngl: int, sparse: int | None, s: Settings) -> tuple[Placement, Use]:
        """``sparse`` layers at the front without their experts on the card; None: all keep them."""
        placement = place(model, ngl, n_cpu_moe(sparse) if sparse else [])
        return placement, use_of(model, placement, s, GPU)

    def done(ngl: int, sparse: int | None, s: Settings, *steps: str) -> Fitted:
        return Fitted(ngl, sparse, s, *with_layers(ngl, sparse, s), steps)

    if with_layers(every, None, settings)[1].total <= budget:
        return done(every, None, settings, "all of it fits")
    steps: list[str] = []
    if not ctx_is_set and settings.ctx > least_ctx:

        def whole(ctx: int) -> bool:
            return with_layers(every, None, replace(settings, ctx=ctx * PAD))[1].total <= budget

        if blocks := most(least_ctx // PAD, settings.ctx // PAD, whole):
            return done(every, None, replace(settings, ctx=blocks * PAD), f"all fits with a context of {blocks * PAD}")
        settings = _roomy(model, budget, settings, least_ctx)
    if not model.experts:
        return _dense(model, budget, settings, with_layers, steps)
    sparse = most_full(model, budget, settings)
    if sparse is None:
        return _dense(model, budget, settings, with_layers, [*steps, "not even the dense part fits"], cpu=True)
    steps.append(f"experts of the first {sparse} of {model.layers} layers stay in host memory")
    return done(every, sparse, settings, *steps)


def _roomy(model: Model, budget: int, settings: Settings, least: int) -> Settings:
    """The context as it is if the dense part fits with it, otherwise the largest that lets it, at least ``least``.

    llama.cpp takes the least at once; experts gain little by that.
    """

    def fits(blocks: int) -> bool:
        placement = place(model, model.layers + 1, cpu_moe())
        return use_of(model, placement, replace(settings, ctx=blocks * PAD), GPU).total <= budget

    blocks = most(least // PAD, settings.ctx // PAD, fits)
    return replace(settings, ctx=blocks * PAD if blocks else least)


def most_full(model: Model, budget: int, settings: Settings) -> int | None:
    """The smallest N of ``--n-cpu-moe`` that fits; None if even all experts in host memory are too few."""

    def fits(full: int) -> bool:
        placement = place(model, model.layers + 1, n_cpu_moe(model.layers - full))
        return use_of(model, placement, settings, GPU).total <= budget

    full = most(0, model.layers, fits)
    return None if full is None else model.layers - full


def longest(model: Model, placement: Placement, budget: int, settings: Settings) -> int:
    """The longest context that a card holds under a placement; 0: none."""

    def fits(blocks: int) -> bool:
        return use_of(model, placement, replace(settings, ctx=blocks * PAD), GPU).total <= budget

    return PAD * (most(1, max(1, settings.ctx // PAD), fits) or 0)


def _no_room(model: Model, budget: int, settings: Settings) -> str:
    """Computing alone is too much for the card: what works instead."""

    def need(ubatch: int) -> int:
        return use_of(model, place(model, 0, cpu_moe()), replace(settings, ubatch=ubatch), GPU).total

    smaller = next((n for n in (256, 128, 64, 32) if n < settings.ubatch and need(n) <= budget), None)
    room = min(longest(model, place(model, 0, cpu_moe()), budget, settings), model.context_length)
    near = "--vram 0, the CPU alone, or a smaller --fit-target if the card is not full"
    if smaller or 0 < room < settings.ctx:
        near = f"-ub {smaller}" if smaller else f"-c {room}"
    return (f"the card has {max(0, budget) / 2**30:.2f} GiB to spend when --fit-target is left free, and computing "
            f"alone takes {need(settings.ubatch) / 2**30:.2f} with -ub {settings.ubatch}; "
            f"nearest that works: {near}")  # fmt: skip


def _dense(model: Model, budget: int, settings: Settings, with_layers: Callable, steps: list[str],
           cpu: bool = False) -> Fitted:  # fmt: skip
    """Whole layers (of a MoE: without experts) from the back."""
    rules = cpu_moe() if cpu else []

    def use(ngl: int) -> Use:
        return use_of(model, place(model, ngl, rules), settings, GPU)

    ngl = most(0, model.layers + 1, lambda n: use(n).total <= budget)
    if ngl is None:
        raise DoesNotFit(_no_room(model, budget, settings))
    steps.append(f"{ngl} of {model.layers + 1} layers on the card")
    sparse = model.layers if cpu else None
    return Fitted(ngl, sparse, settings, place(model, ngl, rules), use(ngl), tuple(steps))
