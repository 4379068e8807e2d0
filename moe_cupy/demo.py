"""``make demo``: the bundled trained model with a quarter of its experts resident, then with all of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from moe_ref import interrupts

if __name__ == "__main__":
    interrupts.watch()

from moe_ref.command import number, run_command
from moe_ref.sampling import Sampler

MODEL = Path(__file__).resolve().parent.parent / "data" / "moe-40m-Q4_K_M.gguf"
PROMPT = "It is a truth universally acknowledged"
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("25% resident", {"cache": "25%", "prefetch": "none"}),
    ("25% + prefetch", {"cache": "25%", "prefetch": "next-gate"}),
    ("all resident", {"cache": "100%", "prefetch": "none"}),
)


def demo(n_predict: int, prompt: str) -> int:
    """Print the text of the first run as it comes, then the figures of all runs side by side."""
    from moe_cupy.numba_cache import compilation_told

    with compilation_told(sys.stderr):
        import_module("moe_cupy.device.host")
        from moe_cupy.engine import Engine, Stats
        from moe_cupy.tools.report import side_by_side

    columns: list[tuple[str, Stats]] = []
    texts: list[str] = []
    for heading, options in RUNS:
        with Engine(MODEL, **options) as engine:
            first = not columns
            if first:
                _introduce(engine)
                print(f"Text, at most {n_predict} tokens, temperature 0.8, seed 1:\n\n{prompt}", end="", flush=True)
            pieces = []
            for piece in engine.generate(prompt, n_predict, Sampler(temp=0.8, seed=1)):
                pieces.append(piece)
                print(piece if first else "", end="", flush=True)
            texts.append("".join(pieces))
            columns.append((heading, engine.stats))
    same = all(text == texts[0] for text in texts)
    print(f"\n\n{side_by_side(columns)}\n")
    print("The text is the same in all three runs: what is cached changes speed, never results." if same else
          "DEFECT: the runs wrote different texts. Please report this.")  # fmt: skip
    return 0 if same else 1


def _introduce(engine) -> None:
    c = engine.config
    print(f"{MODEL.name}: a trained mixture-of-experts model, {c.block_count} layers of {c.expert_count} experts, "
          f"{c.expert_used_count} used per token.")  # fmt: skip
    print("It runs with a quarter of its experts in memory; the rest is read from disk when a token wants it.\n")
    print("\n".join([engine.device_reason, *engine.placement.lines()]) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser("moe_cupy.demo", description=__doc__)
    parser.add_argument("-n", "--predict", type=number(-1), default=160, help="tokens to generate (default 160)")
    parser.add_argument("-p", "--prompt", default=PROMPT, help="text to continue")
    parser.set_defaults(run=lambda args: demo(args.predict, args.prompt))
    return run_command(parser, argv)


if __name__ == "__main__":
    interrupts.run(main)
