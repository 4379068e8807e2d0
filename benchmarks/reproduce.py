"""Repeat a published claim: python benchmarks/reproduce.py NAME [--routes TRACE …] [-m MODEL -f TEXT].

Names: atomic, lfru, least-stale, unions, small-cache, hobbit, thresholds (on --routes); gate-reuse, cache-prior (on
-m).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moe_cupy.lab.reproduce import ON_ROUTES
from moe_cupy.lab.reproduce_models import ON_GATES, ON_MODEL
from moe_cupy.lab.trace import read_trace
from moe_ref.model import Model
from moe_ref.tokenizer import load_tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*ON_ROUTES, *ON_GATES, *ON_MODEL])
    parser.add_argument("--routes", nargs="*", default=[], metavar="TRACE")
    parser.add_argument("--tokens", type=int, default=2000, help="of a trace or a text (default 2000)")
    parser.add_argument("-m", "--model", default=str(DATA / "moe-40m-Q4_K_M.gguf"))
    parser.add_argument("-f", "--file", default=str(DATA / "valid.txt"))
    args = parser.parse_args()
    if args.name in ON_MODEL:
        run = ON_MODEL[args.name]
        model = Model(args.model)
        text = Path(args.file).read_text("utf-8")
        ids = load_tokenizer(model.file.metadata).encode(text, add_special=False, parse_special=False)[: args.tokens]
        lines = run(model, ids)
        print(run.__doc__.splitlines()[0])
        print("\n".join(lines))
        return 0
    on_trace = (ON_ROUTES | ON_GATES)[args.name]
    print(on_trace.__doc__.splitlines()[0])
    if args.name == "thresholds":
        print("\n".join(ON_GATES["thresholds"](None)))
        return 0
    if not args.routes:
        parser.error(f"{args.name} needs --routes TRACE")
    for path in args.routes:
        trace = read_trace(path)
        print(f"{Path(path).name}:")
        for line in on_trace(trace.part(0, min(args.tokens, len(trace.experts)))):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:  # of a file that is missing or wrong
        sys.exit(f"error: {error}")
