"""``run``: text on stdout as it comes; what the run was like on stderr, or with --json in the last line of stdout."""

from __future__ import annotations

import argparse
from typing import Any

from moe_cupy.opening import open_engine
from moe_ref.command import RequestError, prompt_text
from moe_ref.console import note, print_json
from moe_ref.generation import Generation, sampler_of


def cmd_run(args: argparse.Namespace) -> None:
    """Text alone on stdout as it comes; on stderr placement, tok/s, hits, bytes and stalls."""
    from moe_ref.split import open_model

    sampler = sampler_of(args)
    with open_model(args.model) as file:  # a mistake in the prompt is told before a large model is loaded
        text = prompt_text(args, file.metadata)
    with open_engine(args) as engine:
        ids = engine.tokenizer.encode(text, add_special=not args.conversation, parse_special=True)
        if not 1 <= len(ids) <= engine.kv.capacity:
            raise RequestError(f"the prompt has {len(ids)} tokens; the context holds 1..{engine.kv.capacity} (-c)")
        made = print_text(engine, text, engine.generate_tokens(ids, args.predict, sampler, engine.tokenizer.eog_ids))
        report(engine, Generation(sampler, len(ids), made, args.predict, engine.kv.capacity), args.json)


def print_text(engine: Any, prompt: str, tokens: Any) -> list[int]:
    """The prompt once it has been read, for progress is shown until then, and what follows; returns the tokens."""
    from moe_ref.tokenizer import StreamDecoder

    decoder, made = StreamDecoder(engine.tokenizer), []
    for token in tokens:
        print("" if made else prompt, end=decoder.push(token), flush=True)
        made.append(token)
    print("" if made else prompt, end=decoder.flush() + "\n", flush=True)
    return made


def report(engine: Any, generation: Generation, as_json: bool) -> None:
    """The statistics of a run."""
    if not as_json:
        from moe_cupy.tools.report import run_report

        note("\n" + run_report(engine.stats, generation.rows()))
        return
    from moe_cupy.tools.bench import Result, Test, as_record

    stats = engine.stats
    ns = max(1, int(1e9 * stats.generated_seconds))
    record = as_record(engine, Result(Test(0, stats.generated_tokens), (ns,), stats), warm=False)
    print_json(record | generation.record(engine.tokenizer.decode(generation.tokens, continues=True)))
