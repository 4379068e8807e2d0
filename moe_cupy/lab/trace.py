"""Route traces: which experts each token selected in each layer, as one compressed .npz.

Arrays: ``experts`` [T, L, k]; ``starts`` int64 [S], the first token of every sequence; ``meta``, a JSON object
with at least ``n_experts``. Optional: ``weights`` or ``probs`` [T, L, k], the router weight of each selected
expert; ``router`` [T, L, E], the probability of every expert; ``ahead`` [T, L, k], the ids that layer l's router
gave on the hidden state of the layer before (of the first layer, where nothing is known early, its own); ``phase``
uint8 [T], 0 prompt, 1 generated.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

MAX_ELEMENTS = 1 << 31  # of one array: what a small file may make us allocate
PROMPT, GENERATED = 0, 1


class TraceError(ValueError):
    """A file that is no route trace, or one that contradicts itself; one line that says where."""


@dataclass(frozen=True, slots=True)
class RouteTrace:
    """A trace in memory; ``experts`` [T, L, k]. L counts layers with routed experts only."""

    experts: np.ndarray
    n_experts: int
    starts: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)
    weights: np.ndarray | None = None  # [T, L, k]
    router: np.ndarray | None = None  # [T, L, E]
    ahead: np.ndarray | None = None  # [T, L, k]
    phase: np.ndarray | None = None  # [T]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens, layers, experts a token uses in a layer."""
        t, layers, k = self.experts.shape
        return t, layers, k

    @property
    def pairs(self) -> int:
        """All (layer, expert) pairs: what a cache of 100% holds."""
        return self.shape[1] * self.n_experts

    def key_rows(self) -> list[list[list[int]]]:
        """[T][L][k] keys ``layer * n_experts + expert`` as Python integers, as policies take them."""
        first = np.arange(self.shape[1], dtype=np.int64)[:, None] * self.n_experts
        return (self.experts.astype(np.int64) + first).tolist()

    def part(self, begin: int, end: int) -> RouteTrace:
        """Tokens ``begin`` to ``end``; a sequence that is cut starts at ``begin``."""
        inside = self.starts[(self.starts > begin) & (self.starts < end)] - begin
        cut = {name: _cut(getattr(self, name), begin, end) for name in ("weights", "router", "ahead", "phase")}
        starts = np.concatenate([[0], inside]).astype(np.int64)
        return RouteTrace(self.experts[begin:end], self.n_experts, starts, self.meta, **cut)

    def sequences(self) -> Iterator[tuple[int, int]]:
        """(first token, end) of each sequence."""
        return zip(self.starts.tolist(), [*self.starts[1:].tolist(), len(self.experts)], strict=True)


def _cut(array: np.ndarray | None, begin: int, end: int) -> np.ndarray | None:
    return None if array is None else array[begin:end]


def read_trace(path: str | os.PathLike) -> RouteTrace:
    """Read and check a trace. Raises TraceError, in one line, for anything that is not a sound one."""
    try:
        return _assemble(_arrays(path))
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise TraceError(f"{path}: not a readable .npz file ({error})") from error
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error
    except (ValueError, TypeError, SyntaxError, KeyError, MemoryError, RecursionError) as error:
        raise TraceError(f"{path}: an array in it cannot be read ({_first_line(error)})") from error


def _arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        missing = {"experts", "starts", "meta"} - names
        if missing:
            raise TraceError(f"no array {', '.join(sorted(missing))}: not a route trace")
        return {name: _member(archive, name) for name in sorted(names & _KNOWN)}


_KNOWN = {"experts", "starts", "meta", "weights", "probs", "router", "ahead", "phase"}


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array; its header is believed only up to MAX_ELEMENTS, and pickles are never read."""
    with archive.open(f"{name}.npy") as file:
        shape, dtype = _header(file)
        count = 1
        for n in shape:
            count *= int(n)
        if count * max(1, dtype.itemsize) > MAX_ELEMENTS:
            raise TraceError(f"{name}: {list(shape)} {dtype} is more than a trace may hold")
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array format {version} is unknown")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _assemble(arrays: dict[str, np.ndarray]) -> RouteTrace:
    meta = _meta(arrays["meta"])
    return checked(
        RouteTrace(
            arrays["experts"], meta["n_experts"], arrays["starts"], meta, arrays.get("weights", arrays.get("probs")),
            arrays.get("router"), arrays.get("ahead"), arrays.get("phase"),
        )
    )  # fmt: skip


def _meta(array: np.ndarray) -> dict[str, Any]:
    try:
        meta = json.loads(str(array[()]))
    except (ValueError, RecursionError) as error:
        raise TraceError(f"meta: not JSON ({_first_line(error)})") from error
    if not isinstance(meta, dict):
        raise TraceError(f"meta: expected a JSON object, found {type(meta).__name__}")
    count = meta.get("n_experts")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= 1 << 16:
        raise TraceError(f"meta.n_experts: expected a whole number from 1 to 65536, found {str(count)[:40]!r}")
    return meta


def checked(trace: RouteTrace) -> RouteTrace:
    """The trace itself if it is sound; raises TraceError naming the first array that is not."""
    _check_experts(trace.experts, trace.n_experts)
    tokens, layers, k = trace.shape
    _check_starts(trace.starts, tokens)
    wanted = {
        "weights": (tokens, layers, k),
        "router": (tokens, layers, trace.n_experts),
        "ahead": (tokens, layers, k),
        "phase": (tokens,),
    }
    for name, shape in wanted.items():
        array = getattr(trace, name)
        if array is None:
            continue
        if array.shape != shape or array.dtype.kind not in "fui":
            raise TraceError(f"{name}: expected numbers {list(shape)}, found {array.dtype} {list(array.shape)}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise TraceError(f"{name}: holds values that are not finite")
    if trace.ahead is not None and (trace.ahead.min() < 0 or trace.ahead.max() >= trace.n_experts):
        raise TraceError(f"ahead: ids outside 0..{trace.n_experts - 1}")
    return trace


def _check_experts(experts: np.ndarray, n_experts: int) -> None:
    if experts.ndim != 3 or experts.dtype.kind not in "ui" or 0 in experts.shape:
        raise TraceError(f"experts: expected ids [T, L, k], found {experts.dtype} {list(experts.shape)}")
    if experts.min() < 0 or experts.max() >= n_experts:
        raise TraceError(f"experts: ids {experts.min()}..{experts.max()}, but n_experts is {n_experts}")
    ordered = np.sort(experts, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    if twice.any():
        token, layer = (int(i) for i in np.argwhere(twice)[0])
        raise TraceError(f"experts: token {token}, layer {layer} names an expert twice")


def _check_starts(starts: np.ndarray, tokens: int) -> None:
    sound = starts.ndim == 1 and len(starts) and starts.dtype.kind in "ui"
    if not sound or starts[0] != 0 or starts[-1] >= tokens or (np.diff(starts.astype(np.int64)) <= 0).any():
        raise TraceError(f"starts: expected increasing indices of tokens, from 0 to below {tokens}")


def write_trace(out: IO[bytes], trace: RouteTrace) -> None:
    """Write a sound trace; ids as uint8 where they fit, float arrays as they are."""
    checked(trace)
    kind = np.uint8 if trace.n_experts <= 256 else np.uint16
    arrays: dict[str, Any] = {"experts": trace.experts.astype(kind), "starts": trace.starts.astype(np.int64)}
    for name in ("weights", "router", "ahead", "phase"):
        array = getattr(trace, name)
        if array is not None:
            arrays[name] = array if array.dtype.kind == "f" else array.astype(np.uint8 if name == "phase" else kind)
    tokens, layers, k = trace.shape
    meta = trace.meta | {"n_experts": trace.n_experts, "top_k": k, "layers": layers, "n_tokens": tokens}
    np.savez_compressed(out, meta=np.array(json.dumps(meta | {"n_sequences": len(trace.starts)})), **arrays)
