"""The published claims: arithmetic is theirs, replays of batches keep what must hold, routing is put back."""

from __future__ import annotations

import re

import numpy as np
import pytest

from moe_cupy.cache import POLICIES
from moe_cupy.lab.reproduce import ON_ROUTES, batched, miss_share, next_uses
from moe_cupy.lab.reproduce_models import cache_prior, gate_reuse, hobbit, thresholds
from moe_cupy.lab.trace import RouteTrace
from moe_ref import feed_forward
from moe_ref.model import Model
from moe_ref.routing import route
from tests.models import Shape, tiny_moe
from tests.moe_cupy.test_replay import drawn


def test_thresholds_are_the_published_ones():
    text = "\n".join(thresholds())
    for published in ("up to n = 9", "1024 tokens", "512 tokens", "341 tokens", "fetch 0.92", "fetch 0.51"):
        assert published in text


def test_batches_are_unions_of_sequences_side_by_side():
    trace = RouteTrace(np.array([[[0]], [[1]], [[2]], [[1]], [[3]]]), 4, np.array([0, 3]))
    assert batched(trace, 1) == [[[0]], [[1]], [[2]], [[1]], [[3]]]
    assert batched(trace, 2) == [[[0, 1]], [[1, 3]]]
    assert next_uses(batched(trace, 1))[1] == [[3]]


@pytest.mark.parametrize("batch", [1, 2])
def test_belady_spares_most_in_batches_too(batch):
    trace = drawn(60, 2, 10, 2, 3)
    trace = RouteTrace(trace.experts, 10, np.array([0, 30]))
    passes = batched(trace, batch)
    forced, bypass = (miss_share(trace, passes, None, admit=admit) for admit in (False, True))
    assert bypass <= forced
    assert all(miss_share(trace, passes, make) >= forced for make in POLICIES.values())


def test_serving_one_at_a_time_costs_lru_misses():
    """40% of 8 experts are 3 slots; {0,1,2}, then {3,0,1}: event-atomic 3 and 1 misses (3 takes the place of 2).

    One by one, 3 takes the place of 0, then 0 that of 1, then 1 that of 2: 3 and 3 misses."""
    trace = RouteTrace(np.array([[[0, 1, 2]], [[3, 0, 1]]]), 8, np.array([0]))
    passes = [[[0, 1, 2]], [[3, 0, 1]]]
    assert miss_share(trace, passes, POLICIES["lru"]) == pytest.approx(4 / 6)
    assert miss_share(trace, passes, POLICIES["lru"], serial=True) == pytest.approx(6 / 6)


@pytest.mark.parametrize("name", ON_ROUTES)
def test_every_claim_runs_on_a_small_trace(name):
    trace = drawn(60, 3, 24, 2, 5)
    trace = RouteTrace(trace.experts, 24, np.arange(0, 60, 6))
    assert len(list(ON_ROUTES[name](trace))) >= 3


def test_hobbits_shares_add_up():
    weights = np.array([[[0.5, 0.5]], [[0.7, 0.3]], [[0.95, 0.05]]])
    trace = RouteTrace(np.array([[[0, 1]]] * 3), 4, np.array([0]), weights=weights)
    assert next(iter(hobbit(trace))) == "high 66.7%, low 16.7%, skipped 16.7%"


def test_a_still_residual_stream_is_foretold_and_norms_matter(tmp_path):
    path = tiny_moe(tmp_path / "m.gguf", Shape(layers=4), seed=3, zero=("attn_output", "ffn_down_exps"))
    lines = list(gate_reuse(Model(path), range(20)))
    assert len(lines) == 3 and all("recall 1.000" in line for line in lines)
    assert all(float(re.search(r"wrong norm ([\d.]+)", line)[1]) < 1 for line in lines)


def test_cache_prior_of_strength_zero_changes_nothing_and_more_of_it_misses_less(tmp_path):
    model = Model(tiny_moe(tmp_path / "m.gguf", Shape(experts=12, used=2), seed=1))
    lines = list(cache_prior(model, list(np.random.default_rng(0).integers(0, 96, 120))))
    assert feed_forward.route is route, "the model's own routing is back"
    plain = model.logits(list(np.random.default_rng(0).integers(0, 96, 120)))[:-1].astype(float)
    ids = np.random.default_rng(0).integers(0, 96, 120)
    nll = np.log(np.exp(plain).sum(axis=1)) - plain[np.arange(119), ids[1:]]
    misses = [float(re.search(r"([\d.]+)% misses", line)[1]) for line in lines]
    assert f"perplexity {np.exp(nll.mean()):.3f}" in lines[0]
    assert misses[3] < misses[0] and misses[7] < misses[4]
