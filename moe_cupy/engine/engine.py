"""``Engine``: a model file, a memory budget, and text out of it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from moe_cupy.cache import Counters
from moe_cupy.device import open_device
from moe_cupy.device.base import Device
from moe_cupy.engine.choosing import Offer, deciding
from moe_cupy.engine.driven import DrivenForward, place_driven
from moe_cupy.engine.experts import ExpertMover
from moe_cupy.engine.forward import WAIT_EXPERTS, Forward
from moe_cupy.engine.kv import DeviceKV
from moe_cupy.engine.nonfinite import explain, is_finite
from moe_cupy.engine.options import DEFAULT_CONTEXT, Options
from moe_cupy.engine.placement import Placement, open_stores, place_movers
from moe_cupy.engine.split import idle_threads, second_device, split_model, without_effect
from moe_cupy.engine.stats import Stats
from moe_cupy.engine.two_devices import TwoDevices
from moe_cupy.engine.weights import check_formats, load_dense
from moe_cupy.kernels.first_use import FirstUse
from moe_cupy.plan.rules import CPU
from moe_cupy.prefetch import PREFETCHERS
from moe_cupy.store import expert_layout
from moe_ref.config import load_config
from moe_ref.console import progress
from moe_ref.finite import NonFiniteError
from moe_ref.model import check_ids
from moe_ref.sampling import Sampler
from moe_ref.split import open_model
from moe_ref.tensors import check_tensors, vocab_rows
from moe_ref.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from moe_ref.weights import Weights


class EngineError(RuntimeError):
    """An engine that is closed, or asked for two things at a time."""


class Engine:
    """A model ready to run. Use as a context manager, or ``close`` it.

    ``cache`` bounds the routed experts that are resident over all layers; the keywords are the fields of
    ``Options``. Raises GGUFError, ConfigError or FormatError for a file that cannot be run, BudgetError for
    a cache too small, DeviceError for a device that is not here, StoreMismatch for a store of another model;
    later TokenizerError where text is asked of a file without a usable tokenizer, and StoreError where expert
    bytes cannot be read. After a StoreError the engine is usable: what failed is read again when next wanted.
    NonFiniteError names the first weight or result that is NaN or infinite: nothing that follows from one is returned.
    """

    def __init__(self, model: str | os.PathLike, *, _device: Device | None = None, **options: Any):
        self.options = o = Options(**options)
        self.file = open_model(model)
        self.config = load_config(self.file.metadata, vocab_rows(self.file))
        self.views = check_tensors(self.config, self.file)
        self.device, self.device_reason = (_device, "as given") if _device else open_device(o.device, o.threads, o.act)
        self.device_reason += without_effect(o, self.device)
        self._tokenizer: Tokenizer | None = None
        self._in_use, self._sequences = threading.Lock(), 0  # _sequences: begun so far
        self._resources: list[Any] = [self.device, self.file]
        self._finalizer = weakref.finalize(self, _close_all, self._resources)
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
        """Text that follows ``prompt``, piece by piece; greedy unless a sampler is given. -1: until it ends."""
        decoder = StreamDecoder(self.tokenizer)
        for token in self.generate_tokens(prompt, max_tokens, sampler):
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
        Raises ValueError for an empty prompt or one that does not fit the context, and EngineError if another sequence
        is begun on this engine before the last token was taken.
        """
        if not isinstance(prompt, str | Sequence | np.ndarray):
            raise ValueError(f"prompt: {prompt!r}, expected a text or a list of token ids")
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("the prompt has no tokens: there is nothing to continue")
        if stop is None:
            stop = self.tokenizer.eog_ids if isinstance(prompt, str) else ()
        sampler = sampler or Sampler()
        self.reset()
        mine, count, fed = self._sequences, 0, self._checked(ids)
        for piece in self._pieces(fed):
            offer = self._offer(piece, sampler, is_prompt=True)
        while count != max_tokens and (token := offer.taken(sampler)) not in stop:
            yield token
            count += 1
            if count == max_tokens or self.kv.length == self.kv.capacity:
                return
            if self._sequences != mine:
                raise EngineError("another sequence was begun on this engine: it holds one at a time")
            offer = self._offer(self._checked([token]), sampler, is_prompt=False)

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits [T, vocab] of ``tokens`` [T] as a fresh sequence; equal to ``moe_ref``'s."""
        self.reset()
        return np.concatenate([self._timed(ids, False, True) for ids in self._pieces(self._checked(tokens))])

    def prefill(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Feed ``tokens`` [T] after what was fed before; logits [vocab] of the last."""
        for ids in self._pieces(self._checked(tokens)):
            logits = self._timed(ids, True, True)
        return logits[-1]

    def decode(self, token: int) -> np.ndarray:
        """Feed one generated token; logits [vocab] for the next."""
        return self._timed(self._checked([token]), True, False)[-1]

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
        return self.tokenizer.encode(text, add_special=True, parse_special=True)

    @property
    def tokenizer(self) -> Tokenizer:
        """Built from the file when first needed; raises TokenizerError where it cannot be."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.file.metadata)
        return self._tokenizer

    @property
    def stats(self) -> Stats:
        """The counters so far."""
        if isinstance(self.forward, DrivenForward):
            self.forward.pools.to_host()
        stalled = self._stalled() - self._stalled_before
        moved: dict[str, Any] = self.mover.counters() if self.mover is not None else {}
        if self.split.is_divided and CPU in self.movers:
            cpu = self.movers[CPU].counters()
            moved |= {"cpu_experts": cpu["hits"] + cpu["misses"], "cpu_misses": cpu["misses"]}
        return replace(self._stats, stall_us=int(1e6 * stalled), **moved)

    def reset_stats(self) -> None:
        """Start counting from zero; what is resident stays."""
        self._stalled_before = self._stalled()
        if isinstance(self.forward, DrivenForward):
            self.forward.pools.to_host()
        for mover in self.movers.values():
            mover.late = mover.bytes_demand = mover.bytes_prefetch = 0
            for pool in (*mover.cache.pools, *mover.transport.pools):
                pool.counters = Counters()
        self._stats = Stats(
            device=self.device.name,
            policy=self.options.policy,
            prefetch=self.options.prefetch,
            decode=self.options.decode if isinstance(self.forward, DrivenForward) else "host",
            cache_slots=self.placement.slots,
            cache_bytes=self.placement.cache_bytes,
            experts=self.placement.experts,
        )

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

    def _stalled(self) -> float:
        return sum(device.stalls().get(WAIT_EXPERTS, 0.0) for device in self.split.devices.values())

    def _checked(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = check_ids(tokens, self.config.vocab_size)
        if self.kv.length + len(ids) > self.kv.capacity:
            raise ValueError(
                f"{self.kv.length + len(ids)} tokens do not fit the context of {self.kv.capacity}; raise -c (ctx_size)"
            )
        return ids

    def _pieces(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """``ids`` [T], at most ubatch_size at a time; how far they are is shown where that was asked for."""
        steps = [ids[i : i + self.options.ubatch_size] for i in range(0, len(ids), self.options.ubatch_size)]
        if not self.options.progress:
            yield from steps
            return
        with progress("prompt", len(ids) * len(self.config.layers)) as self.forward.progress:
            yield from steps
        self.forward.progress = None

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
                        raise self._explained(ids)
            except BaseException:
                self._recover()
                raise
            self.kv.advance(len(ids))
            self._count(len(ids), time.perf_counter() - start, FirstUse.seconds - once, is_prompt)
            return logits

    def _explained(self, ids: np.ndarray) -> NonFiniteError:
        """The error for a pass over ``ids`` [T] whose logits are not finite."""
        forward = self.forward
        forwards = list(forward.halves.values()) if isinstance(forward, TwoDevices) else [forward]
        weights = Weights(self.file, keep_bytes=0, views=self.views)
        return explain(forwards, lambda: forward(ids, self.kv), weights, ids, self.options.act)

    @contextmanager
    def _used_alone(self) -> Iterator[None]:
        """Raises EngineError, and changes nothing, for a closed engine and while another thread uses it."""
        if not self._finalizer.alive:
            raise EngineError("the engine is closed")
        if not self._in_use.acquire(blocking=False):
            raise EngineError("another thread is using this engine: give each thread its own, or take turns")
        try:
            yield
        finally:
            self._in_use.release()

    def _count(self, tokens: int, seconds: float, once: float, is_prompt: bool) -> None:
        """``seconds`` that a pass took, ``once`` of them for kernels that were used for the first time."""
        s, seconds = replace(self._stats, warmup_seconds=self._stats.warmup_seconds + once), seconds - once
        if is_prompt:
            self._stats = replace(s, prompt_tokens=s.prompt_tokens + tokens, prompt_seconds=s.prompt_seconds + seconds)
        else:
            self._stats = replace(
                s, generated_tokens=s.generated_tokens + tokens, generated_seconds=s.generated_seconds + seconds
            )

    def _recover(self) -> None:
        for device in self.split.devices.values():
            device.recover()
        for mover in self.movers.values():
            mover.recover()
        if isinstance(self.forward, DrivenForward):
            self.forward.pools.recover()


def _close_all(resources: list[Any]) -> None:
    for resource in resources:
        resource.close()
