"""``run``: text on stdout as it comes; what the run was like on stderr, or with --json in the last line of stdout."""

from __future__ import annotations

import argparse
from typing import Any

from moe_cupy.opening import open_engine
from moe_ref.command import RequestError, prompt_ids, prompt_text
from moe_ref.console import note, print_json, warn
from moe_ref.generation import Generation, print_text, rows_text, sampler_of


def cmd_run(args: argparse.Namespace) -> None:
    """Continue a prompt: the text is printed on stdout, statistics on stderr."""
    from moe_ref.split import open_model

    sampler = sampler_of(args)
    with open_model(args.model) as file:  # a mistake in the prompt is told before a large model is loaded
        text = prompt_text(args, file.metadata)
    with open_engine(args) as engine:
        ids = prompt_ids(args, engine.tokenizer, text)
        if not 1 <= len(ids) <= engine.kv.capacity:
            raise RequestError(f"the prompt has {len(ids)} tokens; the context holds 1..{engine.kv.capacity} (-c)")
        tokens = engine.generate_tokens(ids, args.predict, sampler, engine.tokenizer.eog_ids)
        made = print_text(engine.tokenizer, text if args.display_prompt else "", tokens)
        report(engine, Generation(sampler, len(ids), made, args.predict, engine.kv.capacity), args.json)


def report(engine: Any, generation: Generation, as_json: bool) -> None:
    """The statistics of a run."""
    if generation.is_truncated:
        warn(f"stopped after {len(generation.tokens)} tokens: the context of {generation.capacity} is full (-c)")
    if not as_json:
        note(f"\n{engine.stats}\n{rows_text(generation.rows(), width=16)}")
        return
    from moe_cupy.tools.bench import Result, Test, as_record

    stats = engine.stats
    ns = max(1, int(1e9 * stats.decoded_seconds))
    record = as_record(engine, Result(Test(0, stats.decoded_tokens), (ns,), stats), warm=False)
    print_json(record | generation.record(engine.tokenizer.decode(generation.tokens, continues=True)))
