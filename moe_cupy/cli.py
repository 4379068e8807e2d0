"""Command line of the runtime; ``build_parser`` has the commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from importlib import import_module
from typing import Any

from moe_cupy.engine_flags import add_engine
from moe_cupy.engine_parser import BenchParser, CommandParser, EngineParser
from moe_cupy.lab_commands import add_replay, add_routes, add_synth
from moe_cupy.plan_flags import add_plan
from moe_cupy.tools.gpu_check.command import add_gpu_check
from moe_ref.command import (
    RequestError,
    add_model,
    add_prompt,
    add_sampling,
    note,
    number,
    print_json,
    prompt_text,
    read_text,
    run_command,
    token_list,
    whole_file,
)


def with_kernels(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Run a command once the kernels are there; that they are compiled is said where it has to be done."""
    from moe_cupy.numba_cache import compilation_told

    for remark in getattr(args, "remarks", ()):
        note(remark)
    with compilation_told(sys.stderr):
        import_module("moe_cupy.engine")
        if getattr(args, "device", "host") != "cuda":
            import_module("moe_cupy.kernels.host.ops")
    return run(args)


def open_engine(args: argparse.Namespace) -> Any:
    """The engine that the flags describe; says on stderr which device and placement were chosen."""
    from moe_cupy.engine import Engine, Options
    from moe_cupy.numba_cache import compilation_told
    from moe_cupy.plan_commands import placement_lines

    for line in placement_lines(args):
        note(line)
    names = Options.__dataclass_fields__
    options = {name: value for name, value in vars(args).items() if name in names}
    options["ubatch_size"] = min(args.ubatch_size, args.batch_size or args.ubatch_size)  # as llama.cpp bounds it
    with compilation_told(sys.stderr):  # a GPU may leave experts to the CPU
        engine = Engine(args.model, progress=sys.stderr.isatty(), **options)
    note("\n".join([engine.device_reason, *engine.placement.lines(), engine.kv.line()]))
    if args.verbose:
        from moe_cupy.tools.report import tensor_lines

        note("\n".join(tensor_lines(engine)))
    if engine.kv.capacity > engine.config.context_length:
        note(f"-c {engine.kv.capacity}: this model was made for {engine.config.context_length} tokens; "
             "what it writes beyond them is not to be trusted")  # fmt: skip
    if args.threads:
        from moe_cupy.device.host import usable_cores

        if args.threads > usable_cores():
            note(f"-t {args.threads}: there are {usable_cores()} cores; more threads than that are slower")
    return engine


def cmd_run(args: argparse.Namespace) -> None:
    """Text as it comes, then placement, tok/s, hits, bytes and stalls."""
    from moe_cupy.tools.report import side_by_side
    from moe_ref.sampling import Sampler
    from moe_ref.split import open_model
    from moe_ref.tokenizer import StreamDecoder

    sampler = Sampler(args.temp, args.top_k, args.top_p, args.min_p, args.seed)
    with open_model(args.model) as file:  # a mistake in the prompt is told before a large model is loaded
        text = prompt_text(args, file.metadata)
    with open_engine(args) as engine:
        ids = engine.tokenizer.encode(text, add_special=not args.conversation, parse_special=True)
        if not 1 <= len(ids) <= engine.kv.capacity:
            raise RequestError(f"the prompt has {len(ids)} tokens; the context holds 1..{engine.kv.capacity} (-c)")
        decoder, made = StreamDecoder(engine.tokenizer), []
        if args.display_prompt:
            print(text, end="", flush=True)
        for token in engine.generate_tokens(ids, args.predict, sampler, engine.tokenizer.eog_ids):
            made.append(token)
            print(decoder.push(token), end="", flush=True)
        print(decoder.flush())
        if engine.kv.length == engine.kv.capacity and len(made) != args.predict:
            note(f"stopped after {len(made)} tokens: the context of {engine.kv.capacity} is full (-c)")
        stats = engine.stats
        if args.json:
            from moe_cupy.tools.bench import Result, Test, as_record

            ns = max(1, int(1e9 * stats.generated_seconds))
            record = as_record(engine, Result(Test(0, stats.generated_tokens), (ns,), stats), warm=False)
            made_text = engine.tokenizer.decode(made, continues=True)
            print_json(record | {"n_prompt": len(ids), "text": made_text, "tokens": made})
        else:
            print("\n" + side_by_side([("", stats)]))


def cmd_logits(args: argparse.Namespace) -> None:
    """Logits of every position, written as .npz with arrays ``tokens`` int32 [T] and ``logits`` float32 [T, vocab]."""
    import numpy as np

    tokens = token_list(args.tokens)
    with open_engine(args) as engine:
        logits = engine.logits(tokens)
    with whole_file(args.output) as out:
        np.savez(out, tokens=np.array(tokens, np.int32), logits=logits)
    note(f"{args.output}: logits of {len(tokens)} tokens, vocabulary {logits.shape[1]}")


def cmd_perplexity(args: argparse.Namespace) -> None:
    """Chunks of -c tokens, each a fresh context whose first token is not scored."""
    from moe_ref.perplexity import chunk, perplexity, progress, report
    from moe_ref.split import open_model
    from moe_ref.tokenizer import load_tokenizer

    args.ctx_size = args.ctx_size or 256
    with open_model(args.model) as file:
        ids = load_tokenizer(file.metadata).encode(read_text(args.file), add_special=False, parse_special=False)
    chunks = chunk(ids, args.ctx_size, args.chunks)
    with open_engine(args) as engine:
        report(perplexity(engine.logits, progress(chunks)), args.json)


def cmd_check(args: argparse.Namespace) -> int:
    """Every op against its reference, the whole model against moe_ref; exit code 1 on any disagreement."""
    import numpy as np

    from moe_cupy.device import open_device
    from moe_cupy.tools import check

    with open_engine(args) as engine, closing(open_device(args.device, args.threads)[0]) as exact:
        if args.n_tokens > engine.kv.capacity:
            raise RequestError(f"--n-tokens {args.n_tokens}: the context holds {engine.kv.capacity}; raise -c")
        tokens = np.random.default_rng(args.seed).integers(0, engine.config.vocab_size, args.n_tokens)
        outcomes = [*check.check_ops(exact, seed=args.seed), *check.check_model(engine, tokens)]
    print(check.table(outcomes))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def cmd_bench(args: argparse.Namespace) -> None:
    """llama-bench's tests and columns, plus what the expert cache did."""
    from moe_cupy.tools import bench

    tests = bench.tests_of(args.n_prompt, args.n_gen, [bench.Test(*pair) for pair in args.pg], args.n_depth)
    if not tests or args.repetitions < 1:
        raise RequestError("nothing to measure: give -p N, -n N or -pg N,N above 0, and -r of at least 1")
    args.ctx_size = args.ctx_size or max(test.context for test in tests)
    given = token_list(args.tokens if "," in args.tokens else "@" + args.tokens) if args.tokens else None
    records = []
    for threads in args.threads or [None]:
        with open_engine(argparse.Namespace(**{**vars(args), "threads": threads})) as engine:
            for test in tests:
                result = bench.run_test(engine, test, args.repetitions, args.warmup, given)
                records.append(bench.as_record(engine, result, args.warmup))
                note(f"{test.name}: {records[-1]['avg_ts']:.2f} tok/s")
                if args.output == "jsonl":
                    print_json(records[-1])
    if args.output == "json":
        print(json.dumps(records, indent=1))
    elif args.output == "md":
        print(bench.markdown(records))


def cmd_repack(args: argparse.Namespace) -> None:
    """Write a model's experts side by side into a file for --store, or check such a file."""
    from moe_cupy.tools import repack
    from moe_ref.quantize import TYPES, type_called
    from moe_ref.split import open_model

    low = type_called(args.low, TYPES, "--low") if args.low else None
    if low and args.verify:
        raise RequestError("--low says what to write; --verify writes nothing")
    with open_model(args.model) as file:
        steps = repack.verify(file, args.output) if args.verify else repack.repack(file, args.output, low)
        for done, total in steps:
            if sys.stderr.isatty():
                print(f"\r{done} of {total} experts", end="", file=sys.stderr, flush=True)
    size = os.path.getsize(args.output) / 2**20
    note(f"{args.output}: {size:.1f} MiB, {total} experts " + ("as written" if args.verify else "written"))


def cmd_doctor(args: argparse.Namespace) -> int:
    """What this machine has, measured, and a self-test of the kernels."""
    from moe_cupy.device import open_device
    from moe_cupy.tools import check, machine

    if not os.path.isdir(args.folder):
        raise RequestError(f"--folder {args.folder}: there is no such folder")
    if args.write:
        from moe_cupy.profile_command import write_profile

        write_profile(args.write, args.folder)
        return 0
    for name, finding in machine.facts(args.folder):
        print(f"{name:14} {finding}", flush=True)
    passed = True
    for choice in ("host", *(["cuda"] if machine.has_gpu() else [])):
        device, _ = open_device(choice)
        outcomes = list(check.check_ops(device, device.formats))
        device.close()
        print(f"\nkernels of the {choice} device\n{check.table(outcomes)}")
        passed = passed and all(outcome.passed for outcome in outcomes)
    return 0 if passed else 1


def _counts(text: str) -> list[int]:
    return [number(0)(word) for word in text.split(",")]


def _pair(text: str) -> list[int]:
    pair = _counts(text)
    if len(pair) != 2:
        raise argparse.ArgumentTypeError(f"{text[:40]}: expected a prompt and a generation length, such as 512,128")
    return pair


def _add_repack(repacked: argparse.ArgumentParser) -> None:
    add_model(repacked)
    repacked.add_argument("-o", "--output", required=True, metavar="STORE", help="file to write, or to --verify")
    repacked.add_argument("--low", metavar="TYPE", help="also write a smaller copy of each expert, such as Q2_K")
    repacked.add_argument("--verify", action="store_true", help="write nothing: compare all of STORE's checksums")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    add = bench.add_argument_group("tests").add_argument
    add("-p", "--n-prompt", type=_counts, default=[512], metavar="N,…", help="prompt tests, e.g. 128,512 (default 512)")
    add("-n", "--n-gen", type=_counts, default=[128], metavar="N,…", help="generation tests (default 128)")
    add("-pg", type=_pair, default=[], action="append", metavar="PP,TG", help="prompt, then generation")
    add("-d", "--n-depth", type=_counts, default=[0], metavar="N,…", help="tokens in the context before (default 0)")
    add("-r", "--repetitions", type=int, default=5, metavar="N", help="repetitions of a test")
    add("--tokens", metavar="IDS", help="feed these ids: a file, or 1,2,3")
    add("--no-warmup", dest="warmup", action="store_false", help="cold: no expert resident at the start")
    add("-o", "--output", choices=["md", "json", "jsonl"], default="md", help="form of the results")
    add_engine(bench, "q8", threads=_counts)


def build_parser() -> argparse.ArgumentParser:
    """The command line contract."""
    parser = CommandParser("moe_cupy", description="Run mixture-of-experts models that do not fit.")
    kinds: Any = lambda kind=CommandParser, **kwargs: kind(**kwargs)  # noqa: E731
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=kinds)

    def command(name: str, run: Any, engine: bool = True, kind: Any = CommandParser) -> argparse.ArgumentParser:
        about = run.__doc__.splitlines()[0].replace("%", "%%")
        sub = commands.add_parser(name, help=about, description=run.__doc__, kind=EngineParser if engine else kind)
        sub.set_defaults(run=run if name == "repack" else partial(with_kernels, run))
        if engine:
            add_engine(sub, "f32")  # compared with moe_ref
        return sub

    run = command("run", cmd_run, engine=False, kind=EngineParser)
    add_prompt(run)
    either = argparse.BooleanOptionalAction
    run.add_argument("--display-prompt", action=either, default=True, help="write the prompt before its continuation")
    add_sampling(run)
    add_engine(run, "q8")
    logits = command("logits", cmd_logits)
    logits.add_argument("--tokens", required=True, help="ids such as 1,2,3, or @FILE")
    logits.add_argument("-o", "--output", required=True, help="file to write")
    ppl = command("perplexity", cmd_perplexity)
    ppl.add_argument("-f", "--file", required=True, help="UTF-8 text")
    ppl.add_argument("--chunks", type=int, default=None, help="score only the first N chunks")
    check = command("check", cmd_check)
    check.add_argument("--n-tokens", type=number(1), default=32, help="tokens of the whole-model check (default 32)")
    check.add_argument("-s", "--seed", type=number(0), default=0, help="seed of the generated inputs (default 0)")
    _add_bench(command("bench", cmd_bench, engine=False, kind=BenchParser))
    _add_repack(command("repack", cmd_repack, engine=False))
    doctor = command("doctor", cmd_doctor, engine=False)
    doctor.add_argument("--write", metavar="PROFILE.toml", help="only measure this machine for `plan --hardware`")
    doctor.add_argument("--folder", default=".", help="where to measure the disk (default: here)")
    add_gpu_check(command)
    for add in (add_routes, add_replay, add_synth, add_plan):
        add(commands)
    for sub in (run, ppl):
        sub.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(build_parser(), argv)
