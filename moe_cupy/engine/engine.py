"""``Engine``: a model file, a memory budget, and text out of it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from moe_cupy.device import open_device
from moe_cupy.device.base import Device
from moe_cupy.engine.choosing import Offer, deciding
from moe_cupy.engine.counting import Counted
from moe_cupy.engine.driven import DrivenForward, place_driven
from moe_cupy.engine.experts import ExpertMover
from moe_cupy.engine.feeding import in_steps
from moe_cupy.engine.forward import Forward
from moe_cupy.engine.kv import DeviceKV
from moe_cupy.engine.nonfinite import explain, is_finite
from moe_cupy.engine.options import DEFAULT_CONTEXT, Options, shown, whole_number
from moe_cupy.engine.placement import Placement, open_stores, place_movers
from moe_cupy.engine.spelling import python_names
from moe_cupy.engine.split import idle_threads, second_device, split_model, without_effect
from moe_cupy.engine.two_devices import TwoDevices
from moe_cupy.engine.weights import check_formats, load_dense
from moe_cupy.kernels.first_use import FirstUse
from moe_cupy.plan.rules import Override
from moe_cupy.prefetch import PREFETCHERS
from moe_cupy.store import expert_layout
from moe_ref.config import load_config
from moe_ref.model import check_ids
from moe_ref.sampling import Sampler
from moe_ref.split import open_model
from moe_ref.tensors import check_tensors, vocab_rows
from moe_ref.tokenizer import StreamDecoder, Tokenizer, load_tokenizer


class EngineError(RuntimeError):
    """An engine that is closed, asked for two things at a time, or used in a fork of its process."""


class Engine(Counted):
    """A model ready to run. Use as a context manager, or ``close`` it; a thread at a time, in one process.

    >>> with Engine("data/moe-40m-Q4_K_M.gguf", cache="25%") as engine:
    ...     print("The king" + "".join(engine.generate("The king", max_tokens=8)))
    The king of Sodom, the king of

    ``cache`` bounds the routed experts that are resident over all layers; ``Options`` says what the keywords mean.
    Raises ValueError for a keyword's value that cannot be, GGUFError, ConfigError or FormatError for a file that cannot
    be run, BudgetError for a cache too small, DeviceError for a device that is not here, StoreMismatch for a store of
    another model; later TokenizerError where text is asked of a file without a usable tokenizer, and StoreError where
    expert bytes cannot be read. After a StoreError the engine is usable: what failed is read again when next wanted.
    NonFiniteError names the first weight or result that is NaN or infinite: nothing that follows from one is returned.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        cache: str = "auto",
        host_cache: str = "auto",
        policy: str = "echo",
        prefetch: str = "none",
        device: str = "auto",
        threads: int | None = None,
        ctx_size: int = 0,
        ubatch_size: int = 512,
        cache_type_k: str = "f32",
        cache_type_v: str = "f32",
        store: str | os.PathLike | None = None,
        direct_io: bool = True,
        reads_in_flight: int = 4,
        act: str = "f32",
        decode: str = "host",
        n_gpu_layers: str | int | None = None,
        overrides: str | Sequence[Override] = (),
        progress: bool = False,
        _device: Device | None = None,
    ):
        given = locals()
        self.options = Options(**{name: given[name] for name in Options.__dataclass_fields__})
        if not isinstance(model, str | os.PathLike):
            raise ValueError(f"model: {shown(model)}, expected the path of a GGUF file")
        with python_names():
            self._open(model, _device)

    def _open(self, model: str | os.PathLike, _device: Device | None) -> None:
        o = self.options
        self.file = open_model(model)
        self.config = load_config(self.file.metadata, vocab_rows(self.file))
        self.views = check_tensors(self.config, self.file)
        self.device, self.device_reason = (_device, "as given") if _device else open_device(o.device, o.threads, o.act)
        self.device_reason += without_effect(o, self.device)
        self._tokenizer: Tokenizer | None = None
        self._in_use, self._sequences = threading.Lock(), 0  # _sequences: begun so far
        self._resources: list[Any] = [self.device, self.file]
        self._process = os.getpid()
        self._finalizer = weakref.finalize(self, _close_all, self._resources, self._process)
        try:
            flags = o.n_gpu_layers, o.overrides
            self.split = split_model(self.file, self.views, self.device, *flags, self._second_device)
            self.device_reason += idle_threads(o, self.split)
            check_formats(self.config, self.views, self.split)
            self._load()
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompt: str | Sequence[int], max_tokens: int = 128, sampler: Sampler | None = None
    ) -> Iterator[str]:
        """Text that follows ``prompt``, piece by piece; greedy unless a sampler is given. -1: until it ends.

        Raises what ``generate_tokens`` raises.

        >>> with Engine("data/moe-40m-Q4_K_M.gguf") as engine:
        ...     for piece in engine.generate("Once upon", 8, Sampler(temp=0.8, seed=1)):
        ...         print(piece, end="")
         thee!
        What art thou so?
        """
        return self._pieces(self.generate_tokens(prompt, max_tokens, sampler))

    def _pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer)
        for token in tokens:
            yield decoder.push(token)
        yield decoder.flush()

    def generate_tokens(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 128,
        sampler: Sampler | None = None,
        stop: Collection[int] | None = None,
    ) -> Iterator[int]:
        """Ids that follow ``prompt``; ends before an id of ``stop``, at ``max_tokens``, or with the context.

        ``stop`` is the end-of-generation tokens for a text, nothing for a list of ids, unless given.
        Raises ValueError for an argument that cannot be, an empty prompt or one that does not fit the context, and
        EngineError if another sequence is begun on this engine before the last token was taken.
        """
        max_tokens = whole_number("max_tokens", max_tokens, -1)
        ids = self._ids_of(prompt)
        if stop is None:
            stop = self.tokenizer.eog_ids if isinstance(prompt, str) else ()
        elif isinstance(stop, str | bytes) or not isinstance(stop, Collection | np.ndarray):
            raise ValueError(f"stop: {shown(stop)}, expected token ids")
        if sampler is not None and not hasattr(sampler, "sample"):
            raise ValueError(f"sampler: {shown(sampler)}, expected a Sampler")
        return self._continued(ids, max_tokens, sampler or Sampler(), stop)

    def _ids_of(self, prompt: str | Sequence[int]) -> np.ndarray:
        """Token ids [T] of a prompt. Raises ValueError for what is none, and for none at all."""
        if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, str | Sequence | np.ndarray):
            raise ValueError(f"prompt: {shown(prompt)}, expected a text or a list of token ids")
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        if not len(ids):
            raise ValueError("the prompt has no tokens: there is nothing to continue")
        return check_ids(ids, self.config.vocab_size, "prompt")

    def _continued(self, ids: np.ndarray, max_tokens: int, sampler: Sampler, stop: Collection[int]) -> Iterator[int]:
        self.reset()
        mine, count, fed = self._sequences, 0, self._checked(ids)
        for piece in self._steps(fed):
            offer = self._offer(piece, sampler, is_prompt=True)
        while count != max_tokens and (token := offer.taken(sampler)) not in stop:
            self._count_generated()
            yield token
            count += 1
            if count == max_tokens or self.kv.length == self.kv.capacity:
                return
            if self._sequences != mine:
                raise EngineError("another sequence was begun on this engine: it holds one at a time")
            offer = self._offer(self._checked([token]), sampler, is_prompt=False)

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits [T, vocab] of ``tokens`` [T] as a fresh sequence; equal to ``moe_ref``'s.

        >>> with Engine("data/moe-40m-Q4_K_M.gguf") as engine:
        ...     engine.logits(engine.encode("The king")).shape
        (2, 4096)
        """
        self.reset()
        return np.concatenate([self._timed(ids, False, True) for ids in self._steps(self._checked(tokens))])

    def prefill(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Feed ``tokens`` [T] after what was fed before; logits [vocab] of the last."""
        for ids in self._steps(self._checked(tokens)):
            logits = self._timed(ids, True, True)
        return logits[-1]

    def decode(self, token: int) -> np.ndarray:
        """Feed one generated token; logits [vocab] for the next."""
        token = whole_number("token", token, 0, self.config.vocab_size - 1)
        logits = self._timed(self._checked([token]), True, False)[-1]
        self._count_generated()
        return logits

    def reset(self) -> None:
        """Begin a new sequence: the KV cache and recurrent states are emptied, resident experts stay."""
        with self._used_alone():
            self._sequences += 1
            self.kv.reset()
            self.forward.prefetcher.begin_sequence()
            for mover in self.movers.values():
                mover.cache.begin_sequence()

    def empty_cache(self) -> None:
        """As if just opened: no expert is resident, policy and prefetcher have learned nothing, counters are zero."""
        with self._used_alone():
            for device in self.split.devices.values():
                device.synchronize()
            self.forward.prefetcher = PREFETCHERS[self.options.prefetch]()
            for mover in self.movers.values():
                mover.empty()
            if isinstance(self.forward, DrivenForward):
                self.forward.pools.empty()
        self.reset_stats()

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens parsed and added as the model's file says."""
        if not isinstance(text, str):
            raise ValueError(f"text: {shown(text)}, expected text")
        return self.tokenizer.encode(text, add_special=True, parse_special=True)

    @property
    def tokenizer(self) -> Tokenizer:
        """Built from the file when first needed; raises TokenizerError where it cannot be."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.file.metadata)
        return self._tokenizer

    def close(self) -> None:
        """End all threads and close the file; idempotent."""
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _second_device(self) -> Device:
        self._resources.insert(0, second_device(self.options))
        return self._resources[0]

    def _load(self) -> None:
        o, c, split = self.options, self.config, self.split
        self.weights = w = load_dense(split, self.file, c, self.views, o.progress)
        self.movers: dict[str, ExpertMover] = {}
        layout, driven = expert_layout(self.file, self.views, c.block_count, c.expert_count), None
        self.stores = stores = open_stores(split, self.file, layout, o, self._resources)
        if o.decode == "device" and stores:
            driven, reason = place_driven(self.device, stores[split.main], c.expert_used_count, o)
            self.movers = {split.main: driven.mover}
        else:
            self.movers, reason = place_movers(split, stores, c.expert_used_count, o)
        self.mover = self.movers.get(split.main)
        self.placement = Placement.of(split, w.nbytes, self.movers, reason)
        capacity = o.ctx_size or min(DEFAULT_CONTEXT, c.context_length)
        homes = [split.devices[at] for at in split.homes[:-1]]
        self.kv = DeviceKV(homes, c, capacity, o.cache_type_k, o.cache_type_v)
        self.forward: Any
        prefetcher = PREFETCHERS[o.prefetch]()
        if split.is_divided:
            self.forward = TwoDevices(split, self.movers, c, w, prefetcher)
        elif driven is not None:
            self.forward = DrivenForward(self.device, c, w, self.mover, prefetcher, pools=driven)
        else:
            self.forward = Forward(self.device, c, w, self.mover, prefetcher)
        self.reset_stats()

    def _checked(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = check_ids(tokens, self.config.vocab_size)
        if self.kv.length + len(ids) > self.kv.capacity:
            raise ValueError(
                f"{self.kv.length + len(ids)} tokens do not fit the context of {self.kv.capacity}; raise -c (ctx_size)"
            )
        return ids

    def _steps(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        return in_steps(ids, self.options.ubatch_size, self.forward, self.options.progress)

    def _offer(self, ids: np.ndarray, sampler: Sampler, is_prompt: bool) -> Offer:
        """Feed ``ids`` [T], at most ubatch_size; a device with memory of its own finds the logits that count."""
        count = 0 if self.device.is_unified else deciding(sampler, self.config.vocab_size)
        if not count:
            return Offer(self._timed(ids, True, is_prompt)[-1])
        return self._timed(ids, True, is_prompt, partial(self.forward.largest, count=count))

    def _timed(self, ids: np.ndarray, last_only: bool, is_prompt: bool, run: Callable[..., Any] | None = None) -> Any:
        """One pass; on any failure the pipeline is emptied first, so that the engine stays usable."""
        with self._used_alone():
            start, once = time.perf_counter(), FirstUse.seconds
            try:
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # looked for in the logits
                    logits = run(ids, self.kv) if run else self.forward(ids, self.kv, last_only)
                    if not is_finite(logits.logits if isinstance(logits, Offer) else logits):
                        raise explain(self, ids)
            except BaseException:
                self._recover()
                raise
            self.kv.advance(len(ids))
            self._count(len(ids), time.perf_counter() - start, FirstUse.seconds - once, is_prompt)
            return logits

    @contextmanager
    def _used_alone(self) -> Iterator[None]:
        """Raises EngineError, and changes nothing, for an engine closed, forked, or in use by another thread."""
        if os.getpid() != self._process:
            raise EngineError(f"this engine was opened by process {self._process}, of which this one is a fork without "
                              "its threads: open an engine here")  # fmt: skip
        if not self._finalizer.alive:
            raise EngineError("the engine is closed")
        if not self._in_use.acquire(blocking=False):
            raise EngineError("another thread is using this engine: give each thread its own, or take turns")
        try:
            yield
        finally:
            self._in_use.release()

    def _recover(self) -> None:
        for device in self.split.devices.values():
            device.recover()
        for mover in self.movers.values():
            mover.recover()
        if isinstance(self.forward, DrivenForward):
            self.forward.pools.recover()


def _close_all(resources: list[Any], process: int) -> None:
    """In a forked child nothing is closed: the threads to be ended are not there, and the rest ends with the child."""
    if os.getpid() != process:
        return
    for resource in resources:
        resource.close()
