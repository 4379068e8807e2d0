"""moe_ref against the outside references, file by file: `make oracle` writes the table of docs/results.md.

    python benchmarks/oracle.py [--golden FOLDER …] [--engine | --act q8] [--write docs/results.md]

Every GGUF under archs/ and quants/ of the reference sets (../shared/data/golden and tests/data) is run in float32 and
compared with llama.cpp's strict logits (its own on F32 twins; ``logits_deq`` for quantized files), with 16 greedy
tokens, with the residual stream and the routes of each layer, with 160 positions and the 8 tokens after them where
given, and, for information, with transformers.
Tolerance: 1e-3 * max(1, std of the logits). ``--engine`` runs the runtime on ``--device`` (host) at the minimum cache
instead of the reference; ``--act q8`` compares rounded activations with llama.cpp on the quantized files instead, by
the median, which must be within a fifth of float32's. Exit code 1 if a file that can be run disagrees or none can be
run; files that cannot are listed with the reason, and are a failure of the reference.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_ref.model import Model

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = [ROOT.parent / "shared" / "data" / "golden", ROOT / "tests" / "data"]
COLUMNS = ("file", "architecture", "llama.cpp max Δ", "allowed", "transformers max Δ", "top-1 equal",
           "greedy-16 equal", "160 positions, max Δ and greedy-8", "layers and routes")  # fmt: skip
BEGIN, END = "<!-- make oracle: begin -->", "<!-- make oracle: end -->"
Arrays = dict[str, np.ndarray]
Run = tuple[str, Callable[[np.ndarray], np.ndarray], Callable[[list[int], int], list[int]], Arrays]


@contextmanager
def reference(path: Path) -> Iterator[Run]:
    """The reference: its architecture, logits, greedy continuation, and what it observed on the way."""
    model, seen = Model(path), {}
    model.observe = seen.__setitem__

    def greedy(tokens: list[int], count: int) -> list[int]:
        cache, made = model.new_cache(), []
        logits = model.forward(tokens, cache)[-1]
        while len(made) < count:
            made.append(int(logits.argmax()))
            logits = model.forward(made[-1:], cache)[-1]
        return made

    yield model.config.architecture, model.logits, greedy, seen
    model.close()


@contextmanager
def engine(path: Path, device: str = "host") -> Iterator[Run]:
    """The runtime on a device with as few slots as it accepts."""
    from moe_cupy import Engine
    from moe_cupy.cache import BudgetError

    options = {"device": device, "prefetch": "next-gate"}
    try:
        made = Engine(path, cache="slots:0", **options)
    except BudgetError as error:
        made = Engine(path, cache=f"slots:{str(error).split('slots:')[2].split()[0]}", **options)
    with made as runtime:
        yield (runtime.config.architecture, runtime.logits,
               lambda tokens, count: list(runtime.generate_tokens(tokens, count)), {})  # fmt: skip


def strict(path: Path) -> tuple[Arrays, str]:
    """The reference arrays of a file, and the suffix of the strict ones."""
    stem = path.name.removesuffix(".gguf")
    beside = path.with_name(stem + ".npz")
    with np.load(beside if beside.exists() else path.with_name(stem.rsplit(".", 1)[0] + ".npz")) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, "_deq" if "logits_deq" in arrays else ""


def allowed(want: np.ndarray) -> float:
    return 1e-3 * max(1.0, float(want.std()))


def distance(got: np.ndarray, want: np.ndarray) -> float:
    """Largest absolute difference; infinite where something is not a number."""
    return float(np.nan_to_num(np.abs(got - want), nan=np.inf).max())


def layers(seen: Arrays, arrays: Arrays) -> tuple[str, bool]:
    """Whether every layer's residual stream and chosen experts agree; names the first that does not."""
    names = [name for name in arrays if name.startswith("mid/")] if seen else []
    for name in sorted(names, key=lambda n: int(n.rsplit("-", 1)[1])):
        want = arrays[name]
        if distance(seen[name[4:]], want) > (0 if "topk" in name else allowed(want)):
            return f"**{name[4:]} differs**", False
    return f"{len(names)} equal" if names else "–", True


def long_run(path: Path, logits: Callable, greedy: Callable) -> tuple[str, bool]:
    """160 positions, of which the last 16 are known, and 8 tokens more."""
    name, store = path.name.split(".")[0], path.parents[1] / "long160.npz"
    if path.parent.name != "archs" or "MXFP4" in path.name or not store.exists():
        return "–", True
    with np.load(store) as file:
        if f"{name}/tokens" not in file.files:
            return "–", True
        tokens, want, after = (file[f"{name}/{part}"] for part in ("tokens", "logits_last16", "greedy"))
    error, follows = distance(logits(tokens)[-16:], want), greedy(tokens.tolist(), len(after)) == after.tolist()
    return f"{error:.1e}, {'yes' if follows else '**no**'}", error <= allowed(want) and follows


def row(path: Path, open_run: Callable[[Path], Any]) -> tuple[tuple[str, ...], bool]:
    """One line of the table, and whether all agreed."""
    arrays, suffix = strict(path)
    want, tokens, after = arrays["logits" + suffix], arrays["tokens"], arrays["greedy" + suffix]
    with open_run(path) as (architecture, logits, greedy, seen):
        got = logits(tokens)
        depth, layers_agree = layers(dict(seen), arrays)
        follows = greedy(tokens.tolist(), len(after)) == after.tolist()
        long, long_agrees = long_run(path, logits, greedy)
    error, top = distance(got, want), int((got.argmax(1) == want.argmax(1)).sum())
    other = f"{distance(got, arrays['logits_transformers']):.1e}" if "logits_transformers" in arrays else "–"
    passed = error <= allowed(want) and top == len(want) and follows and layers_agree and long_agrees
    return (path.stem, architecture, f"{error:.1e}", f"{allowed(want):.1e}", other, f"{top} of {len(want)}",
            "yes" if follows else "**no**", long, depth), passed  # fmt: skip


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def replace_table(page: Path, table: list[str]) -> None:
    """Put ``table`` between the two marks of a page."""
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text("\n".join([before + BEGIN, *table, END + after]), "utf-8")


ROUNDED = ("file", "positions with equal routes", "median Δ of float32", "median Δ of --act q8", "ratio", "bits equal")
MOST_LEFT = 1 / 5  # of float32's distance


def rounded_row(path: Path) -> tuple[tuple[str, ...], bool]:
    """How near activations rounded to 8 bits come to llama.cpp on the quantized file, where routes agree with it."""
    arrays, _ = strict(path)
    with reference(path) as (_, logits, _, _):
        plain = logits(arrays["tokens"])
    model, seen = Model(path, act="q8"), {}
    model.observe = seen.__setitem__
    rounded = model.logits(arrays["tokens"])
    model.close()
    chosen = [name for name in arrays if "ffn_moe_topk" in name]
    agree = np.all([(seen[name[4:]] == arrays[name]).all(axis=1) for name in chosen], axis=0)
    far, near = (float(np.median(np.abs(x - arrays["logits"])[agree])) for x in (plain, rounded))
    cells = (path.stem, f"{agree.sum()} of {len(agree)}", f"{far:.1e}", f"{near:.1e}", f"{near / far:.3f}")
    return (*cells, f"{(rounded == arrays['logits']).mean():.0%}"), bool(agree.any()) and near <= far * MOST_LEFT


def rounded_table(paths: list[Path]) -> int:
    """The table of ``--act q8``, over the files that have logits of llama.cpp with rounded activations."""
    print(line(ROUNDED), "|---" * len(ROUNDED) + "|", sep="\n")
    failed = 0
    for path in (p for p in paths if strict(p)[1]):
        cells, passed = rounded_row(path)
        failed += [] if passed else [path.stem]
        print(line(cells), flush=True)
    print(f"\n{failed} farther than a fifth of float32's distance", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, nargs="+", default=GOLDEN, metavar="FOLDER")
    parser.add_argument("--engine", action="store_true", help="run moe_cupy at the minimum cache")
    parser.add_argument("--device", default="host", help="where, with --engine: host, emulated, cuda")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the marks of this page")
    parser.add_argument("--act", choices=["f32", "q8"], default="f32", help="q8: compare rounded activations instead")
    args = parser.parse_args()
    folders = [golden / kind for kind in ("archs", "quants") for golden in args.golden]
    paths = [path for folder in folders for path in sorted(folder.glob("*.gguf"))]
    if not paths:
        print(f"no archs/*.gguf or quants/*.gguf in {', '.join(map(str, args.golden))}: give --golden", file=sys.stderr)
        return 2
    if args.act == "q8":
        return rounded_table(paths)
    failed, refused, table = [], [], [line(COLUMNS), "|---" * len(COLUMNS) + "|"]
    print(*table, sep="\n")
    for path in paths:
        try:
            cells, passed = row(path, partial(engine, device=args.device) if args.engine else reference)
        except ValueError as error:
            refused.append(f"{path.stem}: {str(error)[:160]}")
            continue
        failed += [] if passed else [path.stem]
        table.append(line(cells))
        print(table[-1], flush=True)
    summary = f"\n{len(table) - 2} run, {len(failed)} disagree; {len(refused)} cannot be run"
    print(summary, *failed, *refused, sep="\n  ", file=sys.stderr)
    wrong = bool(failed or len(table) == 2 or (refused and not args.engine))
    if args.write and not wrong:
        replace_table(args.write, table)
    return int(wrong)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BrokenPipeError, KeyboardInterrupt):  # whoever reads went away, or had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
