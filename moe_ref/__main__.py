"""Command line of the reference: inspect | logits | generate | perplexity | tokenize | dequantize | quantize."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence

from moe_ref import interrupts

if __name__ == "__main__":
    interrupts.watch()  # before anything large is imported

# One BLAS thread, unless asked otherwise: most matrices here are small, and threads that share busy cores wait for
# each other ten times as long as they work. NumPy reads this when it is imported, so it stands before that.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from moe_ref.command import (
    RequestError,
    add_model,
    add_prompt,
    add_rounding,
    add_sampling,
    number,
    prompt_ids,
    prompt_text,
    read_text,
    refuse_same_file,
    run_command,
    token_list,
    whole_file,
)
from moe_ref.common_flags import add_common
from moe_ref.console import note, print_json, with_progress
from moe_ref.generation import Generation, layers_shown, print_text, rows_text, sampler_of, shown_logits
from moe_ref.gguf import open_gguf
from moe_ref.inspect import describe, table
from moe_ref.model import Model
from moe_ref.parser import Parser
from moe_ref.perplexity import chunk, perplexity, report
from moe_ref.quantize import FILE_TYPES, MIXES, TYPES, choose_types, parse_rule, type_called, write_quantized
from moe_ref.quants import dequantize
from moe_ref.sampling import Sampler
from moe_ref.split import open_model, open_readable


def cmd_inspect(args: argparse.Namespace) -> None:
    """Show architecture, tensors and where the bytes are; works for any GGUF file and says what is unsupported."""
    file, remarks = open_readable(args.model)
    with file:
        facts = describe(file, remarks)
    if args.json:
        print_json(facts)
    else:
        print(table(facts))


def open_rounded(args: argparse.Namespace) -> Model:
    """The model of a command, with the roundings that its flags ask for."""
    return Model(args.model, act=args.act, cache_type_k=args.cache_type_k, cache_type_v=args.cache_type_v)


def cmd_logits(args: argparse.Namespace) -> None:
    """Write the logits of every position of a list of tokens to a file.

    The file is an .npz archive with the arrays tokens, int32 [T], and logits, float32 [T, vocab].
    """
    tokens = token_list(args.tokens)
    logits = shown_logits(open_rounded(args), tokens).astype(np.float32)
    with whole_file(args.output) as out:
        np.savez(out, tokens=np.array(tokens, np.int32), logits=logits)
    note(f"{args.output}: logits of {len(tokens)} tokens, vocabulary {logits.shape[1]}")


def continuation(model: Model, ids: Sequence[int], n_predict: int, sampler: Sampler, stop: frozenset[int]) -> Iterator:
    """Yield token ids that follow ``ids`` until ``n_predict``, an id of ``stop``, or the end of the context."""
    cache = model.new_cache()
    with layers_shown(model):
        logits = model.forward(ids, cache)[-1]
    count = 0
    while count != n_predict and (token := sampler.sample(logits)) not in stop:
        yield token
        count += 1
        if count == n_predict or cache.length >= model.config.context_length:
            return
        logits = model.forward([token], cache)[-1]


def cmd_generate(args: argparse.Namespace) -> None:
    """Continue a prompt: the text is printed on stdout, statistics on stderr."""
    from moe_ref.tokenizer import load_tokenizer

    model = open_rounded(args)
    tokenizer = load_tokenizer(model.file.metadata)
    text = prompt_text(args, model.file.metadata)
    ids = prompt_ids(args, tokenizer, text)
    if not ids or len(ids) > model.config.context_length:
        raise RequestError(f"the prompt has {len(ids)} tokens; the context holds 1..{model.config.context_length}")
    sampler = sampler_of(args)
    made = print_text(tokenizer, text, continuation(model, ids, args.predict, sampler, tokenizer.eog_ids))
    generation = Generation(sampler, len(ids), made, args.predict, model.config.context_length)
    if args.json:
        print_json({"prompt": text} | generation.record(tokenizer.decode(made, continues=True)))
    else:
        note("\n" + rows_text(generation.rows()))


def cmd_perplexity(args: argparse.Namespace) -> None:
    """Perplexity of a text in chunks of -c tokens; the first token of a chunk is not scored."""
    from moe_ref.tokenizer import load_tokenizer

    model = open_rounded(args)
    ids = load_tokenizer(model.file.metadata).encode(read_text(args.file), add_special=False, parse_special=False)
    chunks = chunk(ids, args.ctx_size, args.chunks)
    report(perplexity(model.logits, with_progress(chunks, "chunks", len(chunks))), args.json)


def cmd_tokenize(args: argparse.Namespace) -> None:
    """Print the token ids of a text."""
    from moe_ref.tokenizer import load_tokenizer

    text = args.prompt if args.prompt is not None else read_text(args.file)
    with open_gguf(args.model) as file:
        tokenizer = load_tokenizer(file.metadata)
    ids = tokenizer.encode(text, add_special=not args.no_special, parse_special=not args.no_parse_special)
    if args.json:
        print_json({"tokens": ids})
    else:
        print(" ".join(map(str, ids)))


def cmd_dequantize(args: argparse.Namespace) -> None:
    """Write one tensor as a float32 .npy file, in NumPy's order of axes."""
    with open_readable(args.model)[0] as file:
        if args.tensor not in file.tensors:
            raise RequestError(f"{args.tensor}: no such tensor; `python -m moe_ref inspect` lists them")
        info = file.tensors[args.tensor]
        array = dequantize(file.read(args.tensor), info.type, info.shape, info.name)
    with whole_file(args.output) as out:
        np.save(out, array)
    note(f"{args.output}: {args.tensor} {list(info.shape)} from {info.type}")


def cmd_quantize(args: argparse.Namespace) -> None:
    """Write a copy of a GGUF file with its weight matrices in other types; norms, routers and biases are kept."""
    name, rules = type_called(args.type, (*TYPES, *MIXES), "--type"), [parse_rule(rule) for rule in args.tensor_type]
    with open_model(args.model) as file:
        refuse_same_file(args.output, [part.path for part in getattr(file, "parts", [file])])
        chosen, remarks = choose_types(file, name, rules)
        for remark in remarks:
            note(f"note: {remark}")
        with whole_file(args.output) as out:
            file_type = MIXES[name][1] if name in MIXES else FILE_TYPES[name]
            steps = with_progress(write_quantized(file, chosen, file_type, out), "tensors", len(chosen))
            for i, done in enumerate(steps, 1):
                change = f"{done['from']} -> {done['to']}, relative error {done['error']:.4f}"
                note(f"{i}/{len(chosen)} {done['name']} {change if done['from'] != done['to'] else done['to']}")
            before, after = sum(t.nbytes for t in file.tensors.values()), out.tell()
    note(f"{args.output}: {after:,} bytes, of tensors that had {before:,}")


def build_parser() -> argparse.ArgumentParser:
    """The command line contract."""
    parser = Parser("moe-ref", description="Reference for mixture-of-experts GGUF models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__)
        sub.set_defaults(run=run)
        add_model(sub)
        return sub

    inspect, logits = command("inspect", cmd_inspect), command("logits", cmd_logits)
    generate, ppl = command("generate", cmd_generate), command("perplexity", cmd_perplexity)
    tokenize, deq = command("tokenize", cmd_tokenize), command("dequantize", cmd_dequantize)
    quant = command("quantize", cmd_quantize)
    logits.add_argument("--tokens", required=True, help="ids such as 1,2,3, or @FILE")
    for sub in (logits, generate, ppl):
        add_rounding(sub)
    deq.add_argument("tensor", metavar="TENSOR", help="its name, as `inspect` lists it")
    for sub in (logits, deq):
        sub.add_argument("-o", "--output", required=True, help="file to write")
    quant.add_argument("output", metavar="OUT", help="file to write")
    quant.add_argument("--type", required=True, help=f"of every weight matrix: {', '.join((*TYPES, *MIXES))}")
    rule = "other type for tensors whose name has a match; repeatable, the first that matches counts"
    quant.add_argument("--tensor-type", action="append", default=[], metavar="REGEX=TYPE", help=rule)
    add_prompt(generate)
    add_sampling(generate)
    ppl.add_argument("-f", "--file", required=True, help="UTF-8 text; - is standard input")
    ppl.add_argument("-c", "--ctx-size", type=int, default=256, help="tokens of a chunk (default 256)")
    ppl.add_argument("--chunks", type=number(1), default=None, help="score only the first N chunks")
    source = tokenize.add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", help="text")
    source.add_argument("-f", "--file", help="UTF-8 file; - is standard input")
    tokenize.add_argument("--no-special", action="store_true", help="do not add begin/end tokens")
    tokenize.add_argument("--no-parse-special", action="store_true", help="read special tokens as plain text")
    for sub in (inspect, generate, ppl, tokenize):
        sub.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    add_common(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(build_parser(), argv)


if __name__ == "__main__":
    interrupts.run(main)
