"""Commands of the routing lab: routes record | info | import, replay, synth."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_ref.command import (
    RequestError,
    add_model,
    check_writable,
    decimal,
    number,
    read_text,
    token_list,
    whole_file,
)
from moe_ref.console import note, print_json, with_progress

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
    if args.tokens is not None:
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
    from moe_cupy.lab.record import Recorder, expert_bytes_in
    from moe_ref.attention import softmax

    with Engine(args.model, prefetch="next-gate" if args.ahead else "none", progress=True) as engine:
        recorder = Recorder(engine.config.expert_count, args.router)
        before: dict[int, Any] = {}  # layer -> what was said of it early; nothing is, of the first

        def observe(layer: int, b: Any) -> None:
            ahead = before.pop(layer, b.ids) if args.ahead else None
            if b.ahead is not None:
                before[layer + 1] = b.ahead.copy()
            recorder.layer(layer, experts=b.ids, weights=b.weights, router=softmax(b.router), ahead=ahead)

        engine.forward.observe = observe
        for ids in _prompts(args, lambda: engine.tokenizer):
            recorder.begin_sequence()
            engine.reset()
            for at in range(0, len(ids), engine.options.ubatch_size):
                logits = engine.prefill(ids[at : at + engine.options.ubatch_size])
                recorder.end_pass(generated=False)
            for _ in with_progress(range(args.predict), "tokens", args.predict):
                logits = engine.decode(int(logits.argmax()))
                recorder.end_pass(generated=True)
        return recorder.trace(source="moe_cupy", model=Path(engine.file.path).name, **expert_bytes_in(engine.file))


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
    record.add_argument(
        "--engine", choices=["cupy", "ref"], default="cupy", help="program that runs the model (default cupy)"
    )
    record.add_argument("--router", action="store_true", help="keep the router's probability of every expert")
    record.add_argument(
        "--ahead", action="store_true", help="also keep what the next layer's router chooses one layer early"
    )
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


def cmd_replay(args: argparse.Namespace) -> None:
    """Replay recorded routes through caches of many sizes, policies and prefetchers, and Belady's optimum."""
    from moe_cupy.compiled import POLICIES
    from moe_cupy.lab import report, runs
    from moe_cupy.lab.machine import Machine

    if args.report and not args.report.endswith((".html", ".md")):
        raise RequestError(f"--report {args.report}: expected a name that ends in .html or .md")
    if args.report:
        check_writable(args.report)
        report.pyplot()  # raises now rather than after all the work, where there is none
    machine = Machine(
        link_bytes_s=args.link_gbs * 1e9, link_latency_s=args.link_us * 1e-6, attention_s=args.attention_us * 1e-6,
        device_bytes_s=args.device_gbs * 1e9, host_share=args.host / 100, disk_bytes_s=args.disk_gbs * 1e9,
    )  # fmt: skip
    todo = runs.jobs(
        args.routes, args.policy, args.prefetch, _capacities(args.capacity), scope=args.scope, machine=machine,
        expert_bytes=args.expert_bytes, tokens=args.tokens, profile=args.profile,
    )  # fmt: skip
    rows = []
    for row in with_progress(runs.run_all(todo, args.jobs, POLICIES), "replays", len(todo)):
        rows.append(row)
        note(f"{len(rows)}/{len(todo)} {row['routes']} {row['capacity']:g} {row['policy']} + {row['prefetch']}: "
             f"{100 * row['hit_rate']:.2f}%")  # fmt: skip
    for line in [] if args.expert_bytes else runs.assumed_sizes(args.routes):
        note(line)
    if args.report:
        _write_report(args, rows)
    if args.json:
        print_json({"results": rows})
    else:
        print(report.table(rows))


def _write_report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from moe_cupy.lab import report

    command = f"python -m moe_cupy replay --routes … --policy {args.policy} --prefetch {args.prefetch} " \
              f"--capacity {args.capacity}"  # fmt: skip
    page = report.page(rows, command) if args.report.endswith(".html") else report.markdown(rows, command, args.report)
    with whole_file(args.report) as out:
        out.write(page.encode())
    note(f"{args.report}: written")


def _capacities(text: str) -> list[float]:
    try:
        shares = [float(word.rstrip("%")) / (100 if word.endswith("%") else 1) for word in text.split(",")]
    except ValueError:
        shares = [0.0]
    if not all(0 < share <= 1 for share in shares):
        raise RequestError(f"--capacity {text[:60]}: expected shares above 0, up to 1, such as 0.05,0.1,25%")
    return list(dict.fromkeys(shares))


def add_replay(commands: Any) -> None:
    """``replay``."""
    sub = commands.add_parser("replay", help=cmd_replay.__doc__, description=cmd_replay.__doc__)
    sub.set_defaults(run=cmd_replay)
    add = sub.add_argument
    add("--routes", nargs="+", required=True, metavar="TRACE", help=".npz traces")
    add("--policy", default="all", help="names with commas between, or all (default)")
    add("--prefetch", default="none", help="names with commas between, or all (default none)")
    add("--capacity", default="0.05,0.1,0.25", help="shares of all experts (default 0.05,0.1,0.25)")
    add("--scope", choices=["global", "layer"], default="global", help="one pool, or one a layer (default global)")
    add("--tokens", type=number(1), help="replay only the first N tokens")
    add("--profile", metavar="TRACE", help="chooses the set of the policy static (default: the trace itself)")
    add("--expert-bytes", type=number(1), help="bytes of one expert (default: by the trace or its model's name)")
    add(
        "--link-gbs",
        type=decimal(0.001, 1e6),
        default=50.0,
        help="GB/s of host to device copies (default 50: PCIe 5.0 x16)",
    )
    add("--link-us", type=decimal(0.001, 1e6), default=10.0, help="latency of a copy in us (default 10)")
    add(
        "--attention-us",
        type=decimal(0.001, 1e6),
        default=60.0,
        help="a layer without its experts in us (default 60)",
    )
    add("--device-gbs", type=decimal(0.001, 1e6), default=960.0, help="GB/s of device memory (default 960)")
    add(
        "--host",
        type=decimal(0.001, 100),
        default=100.0,
        help="%% of the experts that host memory holds (default 100)",
    )
    add("--disk-gbs", type=decimal(0.001, 1e6), default=6.0, help="GB/s of the disk behind it (default 6)")
    add("--jobs", type=number(1), help="processes (default: one a core)")
    add("--report", metavar="FILE", help="also write .html, or .md with pictures beside it")
    add("--json", action="store_true", help="one JSON object as the last line of stdout")


def cmd_synth(args: argparse.Namespace) -> None:
    """Write a made-up model of any size that takes recorded routes when the ids 0, 1, 2, … are decoded."""
    from moe_cupy.lab.synth import Plan, synthesise
    from moe_cupy.lab.trace import read_trace

    trace = read_trace(args.routes)
    tokens, layers, used = trace.shape
    count = min(tokens, args.hidden, args.tokens or tokens)
    plan = Plan(count, layers, trace.n_experts, used, args.hidden, args.ffn, args.quant.upper())
    with whole_file(args.output) as out:
        written = synthesise(out, trace, plan, args.seed, Path(args.routes).stem)
    with whole_file(f"{args.output.removesuffix('.gguf')}.tokens") as out:
        out.write("".join(f"{i}\n" for i in range(count)).encode())
    note(f"{args.output}: {written / 2**20:.1f} MiB, {layers} layers x {trace.n_experts} experts, top-{used}; "
         f"feed it the {count} ids of the .tokens file")  # fmt: skip


def add_synth(commands: Any) -> None:
    """``synth``."""
    sub = commands.add_parser("synth", help=cmd_synth.__doc__, description=cmd_synth.__doc__)
    sub.set_defaults(run=cmd_synth)
    sub.add_argument("--routes", required=True, metavar="TRACE", help=".npz trace")
    sub.add_argument("--hidden", type=number(128, 1 << 16), required=True, help="width of the model")
    sub.add_argument("--ffn", type=number(1, 1 << 16), required=True, help="width of an expert")
    sub.add_argument("--quant", default="Q4_K", help="mix (Q4_K_M, Q8_0) or type of all matrices (default Q4_K)")
    sub.add_argument("--tokens", type=number(2), help="tokens of the trace (default: all, at most --hidden)")
    sub.add_argument("-s", "--seed", type=number(0), default=0, help="of the random weights (default 0)")
    sub.add_argument("-o", "--output", required=True, help=".gguf file to write; the ids go beside it, in .tokens")
