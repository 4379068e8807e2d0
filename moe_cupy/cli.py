"""Command line of the runtime; ``build_parser`` has the commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from moe_cupy.bench_command import add_bench, cmd_bench
from moe_cupy.engine_flags import add_engine
from moe_cupy.engine_parser import BenchParser, CommandParser, EngineParser
from moe_cupy.lab_commands import add_replay, add_routes, add_synth
from moe_cupy.opening import open_engine, with_kernels
from moe_cupy.plan_flags import add_plan
from moe_cupy.run_command import cmd_run
from moe_cupy.this_machine import profile_path
from moe_cupy.tools.gpu_check.command import add_gpu_check
from moe_ref.command import (
    RequestError,
    add_model,
    add_prompt,
    add_sampling,
    number,
    read_text,
    run_command,
    token_list,
    whole_file,
)
from moe_ref.common_flags import add_common
from moe_ref.console import Settings, note, progress, with_progress

# Commands of moe-ref that are reached from here too.
OF_REFERENCE = {
    "inspect": "Show what a GGUF file is and where its bytes are.",
    "quantize": "Write a copy of a GGUF file with its weight matrices in other types.",
}


def cmd_logits(args: argparse.Namespace) -> None:
    """Write the logits of every position of a list of tokens to a file.

    The file is an .npz archive with the arrays tokens, int32 [T], and logits, float32 [T, vocab].
    """
    import numpy as np

    tokens = token_list(args.tokens)
    with open_engine(args) as engine:
        logits = engine.logits(tokens)
    with whole_file(args.output) as out:
        np.savez(out, tokens=np.array(tokens, np.int32), logits=logits)
    note(f"{args.output}: logits of {len(tokens)} tokens, vocabulary {logits.shape[1]}")


def cmd_perplexity(args: argparse.Namespace) -> None:
    """Perplexity of a text in chunks of -c tokens; the first token of a chunk is not scored."""
    from moe_ref.perplexity import chunk, perplexity, report
    from moe_ref.split import open_model
    from moe_ref.tokenizer import load_tokenizer

    args.ctx_size = args.ctx_size or 256
    with open_model(args.model) as file:
        ids = load_tokenizer(file.metadata).encode(read_text(args.file), add_special=False, parse_special=False)
    chunks = chunk(ids, args.ctx_size, args.chunks)
    with open_engine(args) as engine:
        report(perplexity(engine.logits, with_progress(chunks, "chunks", len(chunks))), args.json)


def cmd_check(args: argparse.Namespace) -> int:
    """Compare every kernel with its reference and the whole model with moe_ref; exit code 1 if they disagree."""
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


def cmd_repack(args: argparse.Namespace) -> None:
    """Copy a model's experts, each in one piece, into a file for --store, or --verify such a file."""
    from moe_cupy.tools import repack
    from moe_ref.quantize import TYPES, type_called
    from moe_ref.split import open_model

    low = type_called(args.low, TYPES, "--low") if args.low else None
    if low and args.verify:
        raise RequestError("--low says what to write; --verify writes nothing")
    with open_model(args.model) as file:
        steps = repack.verify(file, args.output) if args.verify else repack.repack(file, args.output, low)
        total = finished(steps, "experts")
    size = os.path.getsize(args.output) / 2**20
    note(f"{args.output}: {size:.1f} MiB, {total} experts " + ("as written" if args.verify else "written"))


def finished(steps: Iterator[tuple[int, int]], what: str) -> int:
    """Take all ``steps``, each (done, in all), and show how far they are; how many there were."""
    done, total = next(steps, (0, 0))
    with progress(what, total) as count:
        count(done)
        for _ in steps:
            count(1)
    return total


def cmd_doctor(args: argparse.Namespace) -> int:
    """Show what this machine has, with measured speeds, and test the kernels."""
    from moe_cupy.device import open_device
    from moe_cupy.tools import check, machine

    if not os.path.isdir(args.folder):
        raise RequestError(f"--folder {args.folder}: there is no such folder")
    if args.write:
        from moe_cupy.profile_command import write_profile

        if args.write == str(profile_path()):
            profile_path().parent.mkdir(parents=True, exist_ok=True)
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


def _add_repack(repacked: argparse.ArgumentParser) -> None:
    add_model(repacked)
    repacked.add_argument("-o", "--output", required=True, metavar="STORE", help="file to write, or to --verify")
    repacked.add_argument("--low", metavar="TYPE", help="also write a smaller copy of each expert, such as Q2_K")
    repacked.add_argument("--verify", action="store_true", help="write nothing: compare all of STORE's checksums")


def build_parser() -> argparse.ArgumentParser:
    """The command line contract."""
    parser = CommandParser("moe-cupy", description="Run mixture-of-experts models that do not fit.")
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
    ppl.add_argument("-f", "--file", required=True, help="UTF-8 text; - is standard input")
    ppl.add_argument("--chunks", type=number(1), default=None, help="score only the first N chunks")
    check = command("check", cmd_check)
    check.add_argument("--n-tokens", type=number(1), default=32, help="tokens of the whole-model check (default 32)")
    check.add_argument("-s", "--seed", type=number(0), default=0, help="seed of the generated inputs (default 0)")
    add_bench(command("bench", cmd_bench, engine=False, kind=BenchParser))
    _add_repack(command("repack", cmd_repack, engine=False))
    doctor = command("doctor", cmd_doctor, engine=False)
    doctor.add_argument("--write", metavar="PROFILE.toml", nargs="?", const=str(profile_path()),
        help="only measure this machine for `plan`, which finds it where no file is named")  # fmt: skip
    doctor.add_argument("--folder", default=".", help="where to measure the disk (default: here)")
    add_gpu_check(command)
    for add in (add_routes, add_replay, add_synth, add_plan):
        add(commands)
    for sub in (run, ppl):
        sub.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    for name, about in OF_REFERENCE.items():  # listed here, read by ``main``
        commands.add_parser(name, help=about)
    add_common(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if sys.stderr is not None and sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # a thread of its own would only redraw bars that stand still
        Settings.bar = tqdm
    if words and words[0] in OF_REFERENCE:
        from moe_ref.__main__ import main as reference

        return reference(words)
    return run_command(build_parser(), words)
