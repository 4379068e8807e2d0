"""The two branches of a captured token, in every order that its events allow; and what is seen where one is missing."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adversary import COMPUTE, HOST, AdversarialDevice, Order

from moe_cupy.device.emulated import Graph
from moe_cupy.device.emulated import Order as Ordered
from moe_cupy.engine import Engine
from moe_cupy.engine.driven import BRANCH
from moe_cupy.kernels.cuda import launches
from tests.models import Shape, tiny_moe

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here: the emulated device needs it")
TOKENS = np.random.default_rng(5).integers(0, 96, 11)
ORDERS = list(itertools.permutations((HOST, COMPUTE, BRANCH)))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("m") / "m.gguf", Shape(4, 8, 2), seed=6)


def steps(model: Path, order: Order, plant: Callable[[Any], None] | None = None, **options: Any) -> np.ndarray:
    options = {"cache": "slots:5", "policy": "lfu", "prefetch": "next-gate", "decode": "device"} | options
    with Engine(model, _device=AdversarialDevice(order), ctx_size=32, **options) as engine:
        if plant is not None:
            plant(engine.device)
        engine.prefill(TOKENS[:3])
        return np.stack([engine.decode(int(token)) for token in TOKENS[3:]])


@pytest.fixture(scope="module")
def want(model) -> np.ndarray:
    return steps(model, ORDERS[0], prefetch="none")


@pytest.mark.parametrize("options", [{}, {"host_cache": "slots:9"}, {"policy": "echo"}], ids=str)
def test_any_order_of_the_branches_gives_the_bits_without_the_second(model, want, options):
    for order in ORDERS:
        assert np.array_equal(steps(model, order, **options), want), order


def without(missing: Callable[[Any], bool]) -> Callable[[Any], None]:
    """Graphs are replayed less the orders that are ``missing``."""

    def plant(device: Any) -> None:
        real = device.replay

        def replay(graph: Graph, stream: Any) -> None:
            less = Graph(stream)
            less.items = [item for item in graph.items if not (isinstance(item, Ordered) and missing(item))]
            real(less, stream)

        device.replay = replay

    return plant


no_fork = without(lambda order: order.after.name == BRANCH)
no_join = without(lambda order: order.before.name == BRANCH)


@pytest.mark.parametrize(("plant", "order"), [(no_fork, (HOST, BRANCH, COMPUTE)), (no_join, (HOST, COMPUTE, BRANCH))])
def test_a_missing_fork_or_join_is_seen(model, want, plant, order):
    first, second = (steps(model, order, plant) for _ in range(2))
    assert not np.array_equal(first, want) and np.array_equal(first, second)


def test_a_load_that_does_not_wait_for_what_is_on_its_way_to_the_same_slot_is_seen(model, want, monkeypatch):
    real = launches.resolve
    monkeypatch.setattr(launches, "resolve", lambda *args, ahead=None, **options: real(*args, **options))
    assert not np.array_equal(steps(model, (HOST, COMPUTE, BRANCH)), want)
