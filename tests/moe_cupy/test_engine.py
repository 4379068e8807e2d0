"""The runtime on the host device: what is cached, evicted or fetched ahead never changes a result."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest

from moe_cupy.cache import POLICIES, BudgetError
from moe_cupy.device.base import DeviceError
from moe_cupy.engine import Engine
from moe_cupy.prefetch import PREFETCHERS
from moe_ref.config import ConfigError
from moe_ref.gguf import GGUFError
from moe_ref.model import Model
from moe_ref.sampling import Sampler
from tests.conftest import SHARED
from tests.models import Shape, tiny_moe
from tests.slow_shares import mostly_slow

GOLDEN = SHARED / "data" / "golden"
TRAINED = Path(__file__).resolve().parents[2] / "data" / "moe-40m-Q4_K_M.gguf"
PROMPTS = ("It is a truth universally acknowledged", "And it came to pass", "HAMLET.\n")
QUANTS = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "Q4_0")

golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is absent")


@golden
@pytest.mark.parametrize(
    ("name", "logits", "greedy"),
    [("archs/qwen3moe.BF16", "logits", "greedy"), ("archs/qwen3-dense.BF16", "logits", "greedy")]
    + [(f"quants/qwen3moe-256.{q}", "logits_deq", "greedy_deq") for q in QUANTS],
)
def test_golden_logits_and_greedy_continuation_equal_llama_cpp(name, logits, greedy):
    reference = np.load(GOLDEN / (name.removesuffix(".BF16") + ".npz"))
    want = reference[logits]
    with Engine(GOLDEN / f"{name}.gguf") as engine:
        got = engine.logits(reference["tokens"])
        made = list(engine.generate_tokens(reference["tokens"].tolist(), len(reference[greedy])))
    assert np.abs(got - want).max() <= 1e-3 * max(1, want.std())
    assert np.array_equal(got.argmax(1), want.argmax(1))
    assert made == reference[greedy].tolist()


def run(model, prompts, n_tokens, **options):
    """Greedy tokens for each prompt, past any end of text, and the logits of the last one's prompt."""
    with Engine(model, **options) as engine:
        ids = [engine.encode(prompt) for prompt in prompts]
        made = [list(engine.generate_tokens(prompt, n_tokens)) for prompt in ids]
        return made, engine.logits(ids[-1]), engine.stats


@pytest.fixture(scope="module")
def all_resident():
    """What the trained model writes with every expert in memory: 128 tokens for each prompt, and the last's logits."""
    tokens, logits, stats = run(TRAINED, PROMPTS, 128, cache="100%")
    assert stats.evictions == 0
    assert [len(each) for each in tokens] == [128] * 3
    return tokens, logits


SIZES = ("100%", "50%", "25%", "slots:8")
RUNS = [*itertools.product(SIZES, ["lru"], ("none", "next-gate")), *((size, "echo", "none") for size in SIZES[1:])]


@pytest.mark.parametrize(
    "how", mostly_slow(RUNS, ("25%", "lru", "next-gate"), ("slots:8", "echo", "none")), ids=" ".join
)
def test_trained_model_writes_the_same_128_tokens_at_every_cache_size_policy_and_prefetcher(all_resident, how):
    cache, policy, prefetch = how
    got, logits, stats = run(TRAINED, PROMPTS, 128, cache=cache, policy=policy, prefetch=prefetch)
    want, want_logits = all_resident
    assert got == want and np.array_equal(logits, want_logits)
    assert stats.evictions > 0 or cache == "100%", "nothing was evicted, so nothing was tested"


@pytest.mark.slow(seconds=40)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_writes_the_same_128_tokens_at_every_cache_size(all_resident, policy):
    want, want_logits = all_resident
    for cache, prefetch in itertools.product(("50%", "25%", "slots:8"), ("none", "next-gate")):
        got, logits, _ = run(TRAINED, PROMPTS, 128, cache=cache, policy=policy, prefetch=prefetch)
        assert got == want and np.array_equal(logits, want_logits), f"{cache} {policy} {prefetch}"


def test_every_policy_and_every_prefetcher_writes_the_same():
    want, want_logits, _ = run(TRAINED, PROMPTS[:1], 16, cache="100%")
    pairs = [(policy, "none") for policy in POLICIES] + [("lfu", prefetch) for prefetch in PREFETCHERS]
    for policy, prefetch in pairs:
        got, logits, stats = run(TRAINED, PROMPTS[:1], 16, cache="slots:16", policy=policy, prefetch=prefetch)
        assert got == want and np.array_equal(logits, want_logits), f"{policy} {prefetch}"
        assert stats.evictions > 0 and (stats.bytes_prefetch > 0) == (prefetch != "none"), f"{policy} {prefetch}"


@pytest.mark.parametrize(
    ("shape", "slots"),
    [
        (Shape(used=1, experts=2), "slots:1"),
        (Shape(used=6, experts=6), "slots:6"),
        (Shape(heads=3, kv_heads=3, head=8, vocab=17, tied=True), "slots:2"),
        (Shape(width=32, inner=96, heads=6, kv_heads=1, head=24, dense_type="F16"), "slots:2"),
        (Shape(width=256, inner=256, expert_types=(("Q4_K", "Q4_K", "Q6_K"), ("Q4_K",) * 3, ("Q5_K",) * 3)), "slots:6"),
        (Shape(width=64, inner=32, expert_types=(("Q8_0", "Q4_0", "BF16"), ("Q4_0", "Q4_0", "Q8_0"))), "slots:4"),
    ],
    ids=["k=1", "k=E", "tied", "odd-heads", "three-classes", "mixed-types"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_models_of_other_shapes_equal_the_reference_at_the_minimum_cache(tmp_path, shape, slots, seed):
    path = tiny_moe(tmp_path / "m.gguf", shape, seed)
    tokens = np.random.default_rng(seed).integers(0, shape.vocab, 30)
    want = Model(path).logits(tokens)
    with Engine(path, cache="100%") as engine:
        resident = engine.logits(tokens)
    with Engine(path, cache=slots, prefetch="next-gate", ubatch_size=7) as engine:
        small = engine.logits(tokens)
        engine.reset()
        stepped = np.stack([engine.decode(int(t)).copy() for t in tokens])
    bound = 1e-3 * max(1, want.std())
    assert np.abs(resident - want).max() <= bound
    assert np.array_equal(small, stepped), "chunking must not change a bit: rows are computed by the same code"
    assert np.abs(small - resident).max() <= bound


def test_too_small_a_cache_is_refused_with_the_smallest_that_works(tmp_path):
    path, before = tiny_moe(tmp_path / "m.gguf", Shape(used=3)), set(threading.enumerate())
    with pytest.raises(BudgetError, match="smallest that works is slots:3 = "):
        Engine(path, cache="slots:2")
    with pytest.raises(BudgetError, match="slots:3"):
        Engine(path, cache="1KiB")
    with Engine(path, cache="slots:3") as engine:
        engine.decode(1)
    assert set(threading.enumerate()) <= before, "a refused or closed engine leaves no thread behind"


def test_cache_memory_never_exceeds_what_was_asked(tmp_path):
    path = tiny_moe(tmp_path / "m.gguf", Shape(layers=4, experts=8, expert_types=(("F32",) * 3, ("F16",) * 3)))
    for nbytes in (200_000, 300_001, 500_000):
        with Engine(path, cache=str(nbytes)) as engine:
            assert 0 < engine.placement.cache_bytes <= nbytes


def test_half_precision_kv_cache_is_close_and_an_unknown_type_is_refused(tmp_path):
    path = tiny_moe(tmp_path / "m.gguf")
    tokens = np.arange(40)
    with Engine(path) as exact, Engine(path, cache_type_k="f16", cache_type_v="f16") as half:
        a, b = exact.logits(tokens), half.logits(tokens)
    assert 0 < np.abs(a - b).max() < 0.1 * a.std()
    with pytest.raises(ValueError, match=r"q3_x.*supported: f32, f16"):
        Engine(path, cache_type_k="q3_x")


def test_wrong_requests_are_refused_by_name(tmp_path):
    path = tiny_moe(tmp_path / "m.gguf")
    for options, words in (
        ({"policy": "best"}, "--policy best: unknown; use one of lru"),
        ({"prefetch": "magic"}, "--prefetch magic: unknown"),
        ({"cache": "lots"}, "--cache 'lots'"),
        ({"ctx_size": -1}, "ctx_size"),
        ({"ubatch_size": 0}, "ubatch_size"),
    ):
        with pytest.raises(ValueError, match=words):
            Engine(path, **options)
    with pytest.raises(DeviceError, match="cuda"):
        Engine(path, device="cuda")
    with pytest.raises(GGUFError):
        Engine(tmp_path / "absent.gguf")
    with pytest.raises((GGUFError, ConfigError)):
        Engine(__file__)


def test_tokens_outside_vocabulary_or_context_are_refused_and_the_engine_goes_on(tmp_path):
    path = tiny_moe(tmp_path / "m.gguf")
    with Engine(path, ctx_size=16) as engine:
        for tokens, words in (([], "non-empty"), ([96], "0..95"), ([-1], "0..95"), ([1] * 17, "context of 16")):
            with pytest.raises(ValueError, match=words):
                engine.logits(tokens)
        assert len(list(engine.generate_tokens([1, 2, 3], 100))) == 14, "generation ends with the context"
        assert engine.logits([1, 2]).shape == (2, 96)


def test_sampling_with_a_seed_repeats_and_differs_between_seeds():
    with Engine(TRAINED) as engine:
        a, b, c = ("".join(engine.generate("The", 40, Sampler(temp=1.0, seed=s))) for s in (5, 5, 6))
    assert a == b != c


def test_closing_ends_all_threads_and_the_collector_closes_a_forgotten_engine(tmp_path):
    path = tiny_moe(tmp_path / "m.gguf")
    before = set(threading.enumerate())
    engine = Engine(path, threads=2)
    engine.decode(1)
    assert set(threading.enumerate()) - before
    del engine
    assert not set(threading.enumerate()) - before


def test_counters_follow_from_the_routes(tmp_path):
    """LRU with room for everything misses each (layer, expert) once, then hits."""
    path = tiny_moe(tmp_path / "m.gguf", Shape(layers=3, experts=6, used=2))
    routed = []
    with Engine(path, cache="100%") as engine:
        engine.forward.observe = lambda layer, b: routed.extend((layer, int(e)) for e in b.ids[0])
        for token in range(20):
            engine.decode(token)
        stats, slab = engine.stats, engine.mover.layout.expert_bytes(0)
    assert stats.misses == len(set(routed)), "every distinct expert is loaded once"
    assert stats.hits == len(routed) - stats.misses
    assert stats.bytes_demand == stats.misses * slab
    assert (stats.evictions, stats.bytes_prefetch, stats.generated_tokens) == (0, 0, 20)


def test_a_matrix_of_a_type_without_a_kernel_is_refused_by_name(tmp_path, monkeypatch):
    from moe_cupy.device.host import HostDevice

    path = tiny_moe(tmp_path / "m.gguf", Shape(expert_types=(("Q8_0", "Q8_0", "BF16"),)))
    monkeypatch.setattr(HostDevice, "formats", ("F32", "Q8_0"))
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_down_exps\.weight: the host device has no kernel for type BF16"):
        Engine(path)
