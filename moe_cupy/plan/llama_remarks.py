"""Sentences about a command line of llama.cpp or ik_llama.cpp: mistakes, and what it asks for that is not planned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from moe_cupy.plan.rules import Override

FLOATS = ("f16", "f32", "bf16")
PROMPT_BATCH = "512"


def mistakes(fields: Mapping[str, str], overrides: Sequence[Override]) -> Iterator[str]:
    """What people get wrong, one sentence each."""
    has_layers = fields.get("ngl") not in (None, "auto")
    by_hand = ["-ngl"] * has_layers + ["overrides"] * bool(overrides)
    if by_hand and fields.get("fit", "on") != "off":
        yield f"{' and '.join(by_hand)} given by hand: --fit changes nothing of the placement then"
    mapped = fields.get("load", "auto") in ("auto", "mmap") and not {"no_mmap", "rtr"} & set(fields)
    if overrides and mapped:
        yield ("tensors kept on the CPU are memory-mapped: --load-mode none (older builds: --no-mmap) is quicker; "
               "prompts are planned with copies out of such pages")  # fmt: skip
    if fields.get("ctv", "f16") not in FLOATS and (fields.get("fa", "auto") == "off" or "no_fa" in fields):
        yield "-ctv with a quantized type needs flash attention: take -fa off away"
    if fields.get("ngl") == "0" and overrides:
        yield "-ngl 0 with overrides: nothing is on the GPU but what an override names; -ngl 99 is what is meant"
    batch = fields.get("batch", "2048")
    ubatch = fields.get("ubatch", PROMPT_BATCH)
    if "ubatch" in fields and int(ubatch) > int(batch):
        yield f"-ub {ubatch} above -b {batch}: the batch is the limit, planned with it; raise -b too"
    if "no_op_offload" in fields and overrides:
        yield "--no-op-offload: a long prompt is computed by the CPU for the layers whose experts are there"


def not_planned(fields: Mapping[str, str], cards: Sequence[str]) -> Iterator[str]:
    """What is asked for and changes something, and how it is planned instead."""
    if cards:
        yield f"{', '.join(cards)}: one card is planned for; what goes there is counted on the first"
    for name, flag in (("main_gpu", "-mg"), ("tensor_split", "-ts"), ("split_mode", "-sm"), ("device", "-dev")):
        if name in fields:
            yield f"{flag} {fields[name]}: one card is planned for, without it"
    parallel = fields.get("parallel", "1")
    if parallel.isdecimal() and int(parallel) > 1:
        yield f"-np {parallel}: that many sequences share the context, -c / {parallel} each; speeds are of one alone"
    if fields.get("fa") == "off" or "no_fa" in fields:
        yield "without flash attention a batch keeps the scores of all heads: those buffers are not counted"
    if "nkvo" in fields:
        yield ("-nkvo: the context is in host memory and attention is computed there, as planned; the card is quicker "
               "if it has the room")  # fmt: skip
    if "kv" in fields and ".expert_used_count=" not in fields["kv"]:
        yield f"--override-kv {fields['kv'][:60]}: only expert_used_count is planned with"
    if "ser" in fields and not fields["ser"].endswith((",1", ",1.0")):
        yield f"-ser {fields['ser']}: fewer experts for some tokens; planned with all"
    if "mla" in fields and fields["mla"] not in ("2", "3"):
        yield f"-mla {fields['mla']}: keeps keys and values in another form, more of them; planned as with -mla 3"
    if "mlock" in fields:
        yield "--mlock: pages stay in memory, which is what is planned if they fit"
    if "rtr" in fields:
        yield "-rtr: weights in host memory are repacked and not mapped; the CPU may be quicker than planned"
