"""This runtime on forced token ids 0, 1, 2, …, timed; the same arguments and answer as forced_decode.cpp.

    python benchmarks/forced_decode.py MODEL -t THREADS -p N_PROMPTS -n N_GEN -r REPEAT [--cold] [engine flags]

Prints one line of JSON; times are of CLOCK_MONOTONIC, so that the caller can subtract when it started this.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_cupy.cli import add_engine
from moe_cupy.engine import Engine, Options


def generate(engine: Engine, ids: list[int]) -> tuple[float, float]:
    """Decode from an empty context: the time at which the first was done, and the seconds of all."""
    engine.reset()
    start = time.monotonic()
    engine.decode(ids[0])
    first = time.monotonic()
    for token in ids[1:]:
        engine.decode(token)
    return first, time.monotonic() - start


def measure(engine: Engine, args: argparse.Namespace) -> dict[str, object]:
    """Tokens per second of each repetition of each test, and when the first token was done."""
    ids, first, answer = list(range(max(*args.n_prompt, args.n_gen, 1))), 0.0, dict[str, object]()
    if not args.cold:
        engine.decode(0)
        first = time.monotonic()
        for count in filter(None, args.n_prompt):
            prompt(engine, ids[:count])
        if args.n_gen:
            generate(engine, ids[: args.n_gen])
    engine.reset_stats()
    for count in filter(None, args.n_prompt):
        answer[f"pp{count}"] = [count / prompt(engine, ids[:count]) for _ in range(args.repeat)]
    if args.n_gen:
        runs = [generate(engine, ids[: args.n_gen]) for _ in range(args.repeat)]
        first, answer[f"tg{args.n_gen}"] = first or runs[0][0], [args.n_gen / seconds for _, seconds in runs]
    return answer | {"first_token_at": first, "tokens": args.n_gen}


def prompt(engine: Engine, ids: list[int]) -> float:
    """Seconds of a prompt in an empty context."""
    engine.reset()
    start = time.monotonic()
    engine.prefill(ids)
    return time.monotonic() - start


def main() -> None:
    """Print the answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_engine(parser, "q8")  # as llama.cpp rounds
    parser.add_argument("-p", "--n-prompt", type=lambda text: [int(word) for word in text.split(",")], default=[0])
    parser.add_argument("-n", "--n-gen", type=int, default=0)
    parser.add_argument("-r", "--repeat", type=int, default=1)
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    args.ctx_size = args.ctx_size or max(512, *args.n_prompt, args.n_gen)
    begin = time.monotonic()
    options = {name: value for name, value in vars(args).items() if name in Options.__dataclass_fields__}
    with Engine(args.model, **options) as engine:
        loaded = time.monotonic() - begin
        answer = measure(engine, args)
        placement = engine.placement
        answer |= {
            "load_s": loaded, "stats": engine.stats.to_dict(), "dense_bytes": placement.dense_bytes,
            "kv_bytes": engine.kv.nbytes,
            "how": placement.how_read,
        }  # fmt: skip
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
