"""moe_ref against the outside references, file by file: a Markdown table for docs/results.md.

    python benchmarks/oracle.py [--golden ../shared/data/golden] [--engine]

Every GGUF under archs/ and quants/ is run in float32 and compared with llama.cpp's strict logits (its own on F32
twins; ``logits_deq`` for quantized files) and, where given, with transformers. Tolerance: 1e-3 * max(1, std of the
logits). ``--engine`` runs the runtime on the host device at the minimum cache instead of the reference. Exit code 1
if a file that can be run disagrees; files that cannot be run are listed with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moe_ref.model import Model

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "data" / "golden"
HEAD = "| file | llama.cpp max Δ | allowed | transformers max Δ | top-1 equal | greedy equal | layers |"
Run = tuple[Callable[[np.ndarray], np.ndarray], Callable[[list[int], int], list[int]], dict[str, np.ndarray]]


@contextmanager
def reference(path: Path) -> Iterator[Run]:
    """The reference: logits, greedy continuation, and what it observed on the way."""
    model, seen = Model(path), {}
    model.observe = seen.__setitem__

    def greedy(tokens: list[int], count: int) -> list[int]:
        cache, made = model.new_cache(), []
        logits = model.forward(tokens, cache)[-1]
        while len(made) < count:
            made.append(int(logits.argmax()))
            logits = model.forward(made[-1:], cache)[-1]
        return made

    yield model.logits, greedy, seen
    model.close()


@contextmanager
def engine(path: Path) -> Iterator[Run]:
    """The runtime on the host device with as few slots as it accepts."""
    from moe_cupy import Engine
    from moe_cupy.cache import BudgetError

    try:
        made = Engine(path, cache="slots:0", prefetch="next-gate")
    except BudgetError as error:
        made = Engine(path, cache=f"slots:{str(error).split('slots:')[2].split()[0]}", prefetch="next-gate")
    with made as runtime:
        yield runtime.logits, lambda tokens, count: list(runtime.generate_tokens(tokens, count)), {}


def strict(path: Path) -> tuple[np.lib.npyio.NpzFile, str]:
    """The reference arrays of a file, and the suffix of the strict ones."""
    stem = path.name.removesuffix(".gguf")
    beside = path.with_name(stem + ".npz")
    arrays = np.load(beside if beside.exists() else path.with_name(stem.rsplit(".", 1)[0] + ".npz"))
    return arrays, "_deq" if "logits_deq" in arrays else ""


def layers(seen: dict[str, np.ndarray], arrays: np.lib.npyio.NpzFile, scale: float) -> str:
    """Whether every layer's residual stream and chosen experts agree; names the first that does not."""
    names = [name for name in arrays if name.startswith("mid/") and name[4:] in seen]
    for name in sorted(names, key=lambda n: int(n.rsplit("-", 1)[1])):
        got, want = seen[name[4:]], arrays[name]
        bound = 0 if "topk" in name else 1e-3 * max(scale, want.std())
        if np.abs(got - want).max() > bound:
            return f"**{name[4:]} differs**"
    return f"{len(names)} equal" if names else "–"


def row(path: Path, open_run: Callable) -> tuple[str, bool]:
    """One line of the table, and whether all agreed."""
    arrays, suffix = strict(path)
    want, tokens = arrays["logits" + suffix], arrays["tokens"]
    with open_run(path) as (logits, greedy, seen):
        got = logits(tokens)
        depth = layers(dict(seen), arrays, 1.0)
        chosen = greedy(tokens.tolist(), len(arrays["greedy" + suffix]))
    allowed, error = 1e-3 * max(1.0, float(want.std())), float(np.abs(got - want).max())
    other = f"{np.abs(got - arrays['logits_transformers']).max():.1e}" if "logits_transformers" in arrays else "–"
    top, total = int((got.argmax(1) == want.argmax(1)).sum()), len(want)
    follows = chosen == arrays["greedy" + suffix].tolist()
    passed = error <= allowed and top == total and follows and "differs" not in depth
    cells = (path.stem, f"{error:.1e}", f"{allowed:.1e}", other, f"{top} of {total}", "yes" if follows else "**no**")
    return "| " + " | ".join((*cells, depth)) + " |", passed


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, default=GOLDEN)
    parser.add_argument("--engine", action="store_true", help="run moe_cupy at the minimum cache")
    args = parser.parse_args()
    failed, refused = 0, []
    print(HEAD + "\n" + "|---" * HEAD.count(" |") + "|")
    for path in sorted(args.golden.glob("archs/*.gguf")) + sorted(args.golden.glob("quants/*.gguf")):
        try:
            line, passed = row(path, engine if args.engine else reference)
        except ValueError as error:
            refused.append(f"{path.stem}: {str(error)[:110]}")
            continue
        failed += not passed
        print(line, flush=True)
    print(f"\n{failed} disagree; {len(refused)} cannot be run:", *refused, sep="\n  ", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
