"""The arithmetic behind a plan's figures, as lines: what is printed is what the formula beside it gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from moe_cupy.plan.cost import Term, offload_threshold, size_text, total
from moe_cupy.plan.memory import ACTIVATIONS, PAD, element_bytes, streamed_bytes
from moe_cupy.plan.planner import Plan
from moe_cupy.plan.rules import GPU

ENGINES = ("llama.cpp", "ik_llama.cpp")


def term_lines(terms: Sequence[Term], tokens: int) -> list[str]:
    """Each term's share, their sum, and the speed that this is for ``tokens``."""
    whole = total(terms)
    rows = [f"    {1e3 * t.seconds:9.3f} ms {t.seconds / whole:5.0%}  {t.name}: {t.formula}" for t in terms]
    return [
        *rows,
        f"    {1e3 * whole:9.3f} ms        in all: {tokens} / {1e3 * whole:.4g} ms = {tokens / whole:.4g} tok/s",
    ]


def threshold_lines(plan: Plan) -> list[str]:
    m, least = plan.model, plan.request.threshold
    both = [offload_threshold(m, engine, least) for engine in ENGINES]
    return [f"a batch takes its host weights to the GPU from {both[0]} tokens (llama.cpp, GGML_OP_OFFLOAD_MIN_BATCH), "
            f"{both[1]} = {least} x {m.expert_count} / {m.expert_used_count} (ik_llama.cpp)"]  # fmt: skip


def memory_formulas(plan: Plan) -> Iterator[str]:
    """What the context, the buffers and the cache of a card take; nothing without a card."""
    if plan.use is None:
        return
    yield f"    KV: {' + '.join(past_formulas(plan)) or '0 B'} = {size_text(plan.use.past, 4)}"
    s, m = plan.settings, plan.model
    each = f"4 x {m.vocab_size} + 2 x {s.ctx} + 4 x {ACTIVATIONS} x {m.embedding_length}"
    copied = streamed_bytes(m, plan.placement)
    yield (f"    buffers: {s.ubatch} x ({each}) B + {size_text(copied, 4)} of an expert tensor = "
           f"{size_text(plan.use.compute, 4)}")  # fmt: skip
    if plan.cache_slots:
        yield (f"    expert cache: {plan.cache_slots} x {size_text(m.expert_bytes, 4)} = "
               f"{size_text(plan.cache_bytes, 4)}")  # fmt: skip


def past_formulas(plan: Plan) -> Iterator[str]:
    """Layers x positions x bytes, for each kind of layer whose past is on the card."""
    s = plan.settings
    there = zip(plan.model.pasts, plan.placement.pasts, strict=True)
    for past, count in Counter(past for past, at in there if at == GPU).items():
        if past.state_bytes:
            yield f"{count} layers x {size_text(past.state_bytes, 4)}"
            continue
        kept = min(s.ctx, past.window + s.ubatch) if past.window else s.ctx
        positions = -(-kept // PAD) * PAD
        keys, values = past.keys * element_bytes(s.ctk), past.values * element_bytes(s.ctv)
        yield f"{count} layers x {positions} x {keys + values:g} B"
