"""Commands of the routing lab: routes record | info | import, replay, synth."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_ref.command import RequestError, add_model, note, number, print_json, read_text, token_list, whole_file

Command = Callable[[str, Any], argparse.ArgumentParser]  # (name, what runs it) -> its parser


def cmd_record(args: argparse.Namespace) -> None:
    """Run a model and write which experts every token selected in every layer."""
    from moe_cupy.lab.trace import write_trace

    trace = (_record_engine if args.engine == "cupy" else _record_reference)(args)
    with whole_file(args.output) as out:
        write_trace(out, trace)
    tokens, layers, k = trace.shape
    note(f"{args.output}: {tokens} tokens x {layers} layers x top-{k} of {trace.n_experts}")


def _prompts(args: argparse.Namespace, tokenizer: Callable[[], Any]) -> list[list[int]]:
    if args.tokens:
        return [token_list(args.tokens)]
    texts = [args.prompt] if args.prompt is not None else read_text(args.file).split(args.split or "\0")
    encoded = [tokenizer().encode(text, add_special=True, parse_special=True) for text in texts if text]
    if not any(encoded):
        raise RequestError("the prompt has no tokens: there is nothing to record")
    return [ids for ids in encoded if ids]


def _record_reference(args: argparse.Namespace) -> Any:
    from moe_cupy.lab.record import record_reference
    from moe_ref.model import Model
    from moe_ref.tokenizer import load_tokenizer

    model = Model(args.model)
    prompts = _prompts(args, lambda: load_tokenizer(model.file.metadata))
    return record_reference(model, [(ids, args.predict) for ids in prompts], args.router)


def _record_engine(args: argparse.Namespace) -> Any:
    from moe_cupy.engine import Engine
    from moe_cupy.lab.record import Recorder
    from moe_ref.attention import softmax

    with Engine(args.model, prefetch="next-gate" if args.ahead else "none") as engine:
        recorder = Recorder(engine.config.expert_count, args.router)
        before: dict[int, Any] = {}  # layer -> what was said of it early; nothing is, of the first

        def observe(layer: int, b: Any) -> None:
            ahead = before.pop(layer, b.ids) if args.ahead else None
            before[layer + 1] = b.ahead.copy()
            recorder.layer(layer, experts=b.ids, weights=b.weights, router=softmax(b.router), ahead=ahead)

        engine.forward.observe = observe
        for ids in _prompts(args, lambda: engine.tokenizer):
            recorder.begin_sequence()
            engine.reset()
            for at in range(0, len(ids), engine.options.ubatch_size):
                logits = engine.prefill(ids[at : at + engine.options.ubatch_size])
                recorder.end_pass(generated=False)
            for _ in range(args.predict):
                logits = engine.decode(int(logits.argmax()))
                recorder.end_pass(generated=True)
        return recorder.trace(source="moe_cupy", model=Path(engine.file.path).name)


def cmd_info(args: argparse.Namespace) -> None:
    """What a trace looks like: skew, reuse, overlap with the token before, entropy by layer."""
    from moe_cupy.lab import info
    from moe_cupy.lab.trace import read_trace

    trace = read_trace(args.routes)
    facts = info.describe(trace)
    if args.plot:
        figure = info.plot(trace, args.routes.rpartition("/")[2])
        with whole_file(args.plot) as out:
            figure.savefig(out, format="png", dpi=110)
        note(f"{args.plot}: written")
    if args.json:
        print_json(facts)
    else:
        print(info.text(facts))


def cmd_import(args: argparse.Namespace) -> None:
    """Turn routes that another tool wrote into a trace: CSV, JSONL, or llama.cpp's dumps of ffn_moe_topk."""
    from moe_cupy.lab.importers import guess_format, import_trace
    from moe_cupy.lab.trace import write_trace

    text = read_text(args.file)
    kind = args.format or guess_format(args.file, text)
    trace = import_trace(text, kind, args.experts, source_path=args.file.rpartition("/")[2])
    with whole_file(args.output) as out:
        write_trace(out, trace)
    note(f"{args.output}: {trace.shape[0]} tokens x {trace.shape[1]} layers x top-{trace.shape[2]}, from {kind}")


def add_routes(commands: Any) -> None:
    """``routes record | info | import``."""
    about = "Record, describe or import route traces."
    actions = commands.add_parser("routes", help=about, description=about).add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )

    def action(name: str, run: Any) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        return sub

    record = action("record", cmd_record)
    add_model(record)
    given = record.add_mutually_exclusive_group(required=True)
    given.add_argument("-p", "--prompt", help="text to run")
    given.add_argument("-f", "--file", help="UTF-8 text to run")
    given.add_argument("--tokens", help="ids such as 1,2,3, or @FILE")
    record.add_argument("--split", help="with -f: this text separates sequences")
    record.add_argument("-n", "--predict", type=number(0), default=0, help="greedy tokens after each prompt")
    record.add_argument("--engine", choices=["cupy", "ref"], default="cupy", help="who runs the model (default cupy)")
    record.add_argument("--router", action="store_true", help="keep the router's probability of every expert")
    record.add_argument("--ahead", action="store_true", help="keep what the next layer's router says one layer early")
    record.add_argument("-o", "--output", required=True, help=".npz file to write")
    info = action("info", cmd_info)
    info.add_argument("routes", metavar="TRACE", help=".npz trace")
    info.add_argument("--plot", metavar="PNG", help="write four pictures")
    info.add_argument("--json", action="store_true", help="one JSON object")
    imported = action("import", cmd_import)
    imported.add_argument("file", metavar="FILE", help="what the other tool wrote")
    imported.add_argument("-o", "--output", required=True, help=".npz file to write")
    imported.add_argument("--format", choices=["csv", "jsonl", "llama.cpp"], help="default: by name and content")
    imported.add_argument("--experts", type=number(1, 65536), help="experts a layer has (default: highest id + 1)")
