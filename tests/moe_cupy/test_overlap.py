"""Copies overlap with compute by exactly what the schedule predicts; all times are virtual, none is measured.

Symbols: L layers, k experts per token, A attention (the only other cost), X one expert's compute, R one
expert's read. Expected totals are derived by hand in each test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_cupy.device.virtual import VirtualDevice
from moe_cupy.engine import Engine
from tests.models import Shape, tiny_moe

L, K, E = 5, 3, 8
SHAPE = Shape(layers=L, experts=E, used=K)


def device(attention: float, expert: float, read: float) -> VirtualDevice:
    costs = {"attention": lambda buffers: attention, "experts": lambda buffers: expert * len(buffers["wanted"])}
    return VirtualDevice(lambda op, buffers: costs[op](buffers) if op in costs else 0.0, lambda name: read)


def decode_time(path: Path, dev: VirtualDevice, token: int = 7, **options) -> float:
    """Virtual seconds of one decoded token on a cold cache."""
    with Engine(path, _device=dev, **options) as engine:
        start = dev.now
        engine.decode(token)
        return dev.now - start


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Routes differ from layer to layer and from what the next-layer router guesses."""
    return tiny_moe(tmp_path_factory.mktemp("m") / "m.gguf", SHAPE, seed=3)


@pytest.fixture(scope="module")
def still_model(tmp_path_factory) -> Path:
    """No block changes the residual stream, so the next layer's router is guessed exactly."""
    path = tmp_path_factory.mktemp("m") / "still.gguf"
    return tiny_moe(path, SHAPE, seed=3, zero=("attn_output", "ffn_down_exps"))


@pytest.mark.parametrize(("a", "x", "r"), [(2.0, 1.0, 5.0), (1.0, 4.0, 3.0), (3.0, 2.0, 2.0)])
def test_experts_compute_while_the_next_ones_are_read(model, a, x, r):
    """One read at a time: expert i is ready at iR, so a layer takes A + max(KR + X, R + KX), not A + K(R + X)."""
    dev = device(a, x, r)
    total = decode_time(model, dev, cache=f"slots:{K}", reads_in_flight=1)
    assert total == pytest.approx(L * (a + max(K * r + x, r + K * x)))
    one_after_the_other = L * (a + K * (r + x))
    assert total == pytest.approx(one_after_the_other - L * (K - 1) * min(r, x))


def test_several_reads_in_flight_divide_the_waiting(model):
    """K reads at once: all experts are ready at R."""
    a, x, r = 2.0, 1.0, 5.0
    total = decode_time(model, device(a, x, r), cache=f"slots:{K}", reads_in_flight=K)
    assert total == pytest.approx(L * (a + r + K * x))


def test_without_misses_only_compute_remains(model):
    a, x, r = 2.0, 1.0, 5.0
    dev = device(a, x, r)
    with Engine(model, _device=dev, cache="100%") as engine:
        engine.decode(7)
        engine.reset()
        start, stalled = dev.now, engine.stats.stall_us
        engine.decode(7)
        assert dev.now - start == pytest.approx(L * (a + K * x))
        assert engine.stats.stall_us == stalled


def test_right_prefetch_hides_reads_that_fit_under_compute(still_model):
    """KR <= KX + A: from the second layer on no read is waited for."""
    a, x, r = 3.0, 2.0, 2.5
    assert K * r <= K * x + a
    dev = device(a, x, r)
    total = decode_time(still_model, dev, cache=f"slots:{3 * K}", prefetch="next-gate", reads_in_flight=1)
    first_layer = a + max(K * r + x, r + K * x)
    # Layer 1's reads queue behind layer 0's and begin at KR after its router; they still end before they are needed.
    assert first_layer - a + a >= 2 * K * r - (K - 1) * x
    assert total == pytest.approx(first_layer + (L - 1) * (a + K * x))


def test_right_prefetch_is_bound_by_reads_where_they_are_longer(still_model):
    """KR > KX + A: the reader never rests, so the last expert of layer L arrives at A + LKR."""
    a, x, r = 1.0, 0.5, 3.0
    dev = device(a, x, r)
    total = decode_time(still_model, dev, cache="100%", prefetch="next-gate", reads_in_flight=1)
    assert total == pytest.approx(a + L * K * r + x)
    without = decode_time(still_model, device(a, x, r), cache="100%", prefetch="none", reads_in_flight=1)
    assert without == pytest.approx(L * (a + K * r + x))
    assert total < without


def test_demand_loads_overtake_queued_prefetches(model):
    """A demand load waits for at most one slab that is being read already."""
    r = 4.0
    dev = device(1.0, 1.0, r)
    routed = {}
    with Engine(model, _device=dev, cache="100%", prefetch="next-gate", reads_in_flight=1) as engine:
        engine.forward.observe = lambda layer, b: routed.update({layer: set(b.ids[0].tolist())})
        engine.decode(7)
        assert engine.stats.bytes_prefetch > 0, "the model must prefetch, or the test says nothing"
        assert engine.stats.misses > K, "some guesses must be wrong, or no demand load meets a queued prefetch"
        reads = [s for s in dev.spans if s.lane.startswith("expert-read")]
        routers = [s.end for s in dev.spans if s.lane == "compute" and s.name == "attention"]  # router costs nothing
    for layer, known in enumerate(routers):
        wanted = {f"load {layer * E + expert}" for expert in routed[layer]}
        begun = sorted(s.start for s in reads if s.name in wanted and s.start >= known)
        for i, start in enumerate(begun):
            assert start <= known + (i + 1) * r, f"layer {layer}: demand load {i} began {start - known} late"


def test_virtual_device_and_threads_give_the_same_logits(model):
    tokens = np.arange(20) % SHAPE.vocab
    with Engine(model, cache=f"slots:{K}") as real:
        want = real.logits(tokens)
    with Engine(model, _device=device(1, 1, 1), cache=f"slots:{K}") as virtual:
        assert np.array_equal(virtual.logits(tokens), want)


def test_prefill_reads_one_wave_while_the_other_computes(model):
    """T tokens use n > C experts: waves of C//2, one computes while the next is read, one read at a time.

    With X > R (all X per expert, however many tokens): each wave after the first is there in time, so a
    layer takes A + R + nX. The next layer's waves evict this layer's experts, so nothing carries over.
    """
    a, x, r, slots = 2.0, 3.0, 1.0, 4
    dev = device(a, x, r)
    tokens = np.arange(40) % SHAPE.vocab
    with Engine(model, _device=dev, cache=f"slots:{slots}", policy="lru", reads_in_flight=1) as engine:
        used = []
        engine.forward.observe = lambda layer, b: used.append(len(np.unique(b.ids)))
        start = dev.now
        engine.logits(tokens)
        assert min(used) > slots, "every layer must need several waves, or the test says nothing"
        assert engine.stats.hits == 0
        assert dev.now - start == pytest.approx(sum(a + r + n * x for n in used))
