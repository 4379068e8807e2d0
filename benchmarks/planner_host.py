"""Predictions against this repository's own host device at five cache sizes.

python -m moe_cupy doctor --write profile.toml --folder DISK
python -m moe_cupy synth --routes TRACE.npz --hidden 2048 --ffn 768 -o DISK/replay.gguf
python benchmarks/planner_host.py DISK/replay.gguf --routes TRACE.npz --profile profile.toml [-t 1] [--act q8]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_cupy.engine import Engine
from moe_cupy.lab.runs import Job, run
from moe_cupy.plan.cost import host_decode, total
from moe_cupy.plan.hardware import machine_called
from moe_cupy.plan.shapes import from_file
from moe_ref.command import token_list
from moe_ref.split import open_model


def measured(path: str, tokens: list[int], share: float, warm: int, how: dict[str, Any]) -> tuple[float, float]:
    """Tokens a second and hit rate, after ``warm`` tokens; ``how``: threads and act."""
    with Engine(path, device="host", cache=f"{100 * share:g}%", **how) as engine:
        for token in tokens[:warm]:
            engine.decode(token)
        engine.reset_stats()
        for token in tokens[warm:]:
            engine.decode(token)
        return engine.stats.decode_tok_s, engine.stats.hit_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--routes", required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--tokens", type=int, default=72)
    parser.add_argument("--warm", type=int, default=24)
    parser.add_argument("--shares", default="1,0.5,0.25,0.125,0.0625", help="cache sizes, in this order")
    parser.add_argument("-t", "--threads", type=int, default=None)
    parser.add_argument("--act", choices=("f32", "q8"), default="q8")
    args = parser.parse_args()
    how = {"threads": args.threads, "act": args.act}
    with open_model(args.model) as file:
        model = from_file(file)
    machine = machine_called(args.profile)
    tokens = token_list("@" + str(Path(args.model).with_suffix(".tokens")))[: args.tokens]
    print("| cache | hit rate predicted | measured | tok/s predicted | measured | error |\n|--:|--:|--:|--:|--:|--:|")
    for share in map(float, args.shares.split(",")):
        hits = predicted_hits(args.routes, share, args.tokens, args.warm)
        predicted = 1 / total(host_decode(model, machine, hits, args.threads, args.act))
        tok_s, hit_rate = measured(args.model, tokens, share, args.warm, how)
        error = predicted / tok_s - 1
        print(
            f"| {share:.1%} | {hits:.1%} | {hit_rate:.1%} | {predicted:.2f} | {tok_s:.2f} | {error:+.1%} |", flush=True
        )


def predicted_hits(routes: str, share: float, tokens: int, warm: int) -> float:
    """The default policy's, replayed on the trace; tokens before ``warm`` are not counted."""
    early, late = (run(Job(routes, "echo", "none", share, tokens=n)) for n in (warm, tokens))
    hits, misses = late["hits"] - early["hits"], late["misses"] - early["misses"]
    return float(hits / (hits + misses))


if __name__ == "__main__":
    main()
