"""How long opening a GGUF file takes and what memory it adds: `python benchmarks/gguf_open.py [FILE.gguf ...]`.

Always measures made-up 4 GB sparse files too: a header of published size, and the most costly ones that are accepted.
Each file gets a fresh process, whose peak resident memory after one open, less that before, is "added RSS".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gguf_writer import array_head, header, published_size, string, tensor_entry, with_key  # noqa: E402

from moe_ref.gguf import MAX_KEYS, MAX_TENSORS  # noqa: E402
from moe_ref.gguf_bytes import MAX_ARRAY_STRINGS  # noqa: E402

SPARSE_BYTES = 4 << 30
CHILD = """
import json, statistics, sys, time
from moe_ref.gguf import open_gguf
def kib(field): return int(open("/proc/self/status").read().split(field + ":")[1].split()[0])
def timed():
    start = time.perf_counter()
    with open_gguf(sys.argv[1]) as gguf: return time.perf_counter() - start, len(gguf.tensors)
before = kib("VmRSS")
n_tensors = timed()[1]
added = kib("VmHWM") - before
times = [timed()[0] for _ in range(5)]
print(json.dumps({"tensors": n_tensors, "open_ms": 1e3 * statistics.median(times), "added_mb": added / 1024}))
"""


def most_costly() -> bytes:
    """Every cap reached at once: tensors, keys, and strings in arrays."""
    keys = [string(f"key{i}") + array_head(8, 0) for i in range(MAX_KEYS - 1)]
    keys.append(string("tokens") + array_head(8, MAX_ARRAY_STRINGS) + bytes(8 * MAX_ARRAY_STRINGS))
    entries = (tensor_entry(f"blk.{i}.ffn_up_exps.weight", 0, (1,), 32 * i) for i in range(MAX_TENSORS))
    return header(tensors=MAX_TENSORS, keys=MAX_KEYS, body=b"".join(keys) + b"".join(entries))


def made_up(folder: Path) -> Iterator[Path]:
    headers = {
        "500 tensors, 150k tokens, 150k merges": published_size(),
        "zero-filled strings": with_key(array_head(8, MAX_ARRAY_STRINGS)),
        "all caps reached": most_costly(),
    }
    for name, raw in headers.items():
        path = folder / f"{name} (4 GB)"
        path.write_bytes(raw)
        os.truncate(path, SPARSE_BYTES)
        yield path


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'file':48} {'tensors':>8} {'open ms':>9} {'added RSS MB':>13}")
        for path in [*map(Path, sys.argv[1:]), *made_up(Path(folder))]:
            command = [sys.executable, "-c", CHILD, str(path.resolve())]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout)
            print(f"{path.name:48} {row['tensors']:8} {row['open_ms']:9.1f} {row['added_mb']:13.1f}")


if __name__ == "__main__":
    main()
