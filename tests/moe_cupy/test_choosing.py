"""A device with memory of its own sends the few logits that count: the same tokens as from all of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cupy import Cupy

from moe_cupy.device.cuda import CudaDevice
from moe_cupy.engine import Engine
from moe_cupy.engine.choosing import Offer, deciding
from moe_ref.finite import NonFiniteError
from moe_ref.sampling import Sampler
from tests.eight_bits import RecordingDevice
from tests.gguf_writer import write_gguf
from tests.models import Shape, metadata, tensors, tiny_moe

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not here: the emulated device needs it")
SHAPE = Shape(layers=2, vocab=9001)  # three parts of the largest logits
HOT = {"temp": 2.0, "top_k": 64, "top_p": 1.0, "min_p": 0.0, "seed": 4}
SAMPLERS: list[dict[str, Any]] = [{}, {"temp": 0.9, "top_k": 40, "seed": 3}, HOT]
WAYS = {"host": {"ubatch_size": 4}, "driven": {"decode": "device", "cache": "slots:4"}}
PROMPT = np.random.default_rng(1).integers(0, SHAPE.vocab, 11).tolist()


class SeesAll(Sampler):
    """The same sampler, of which the engine cannot know what it looks at."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_moe(tmp_path_factory.mktemp("m") / "m.gguf", SHAPE, seed=2)


def written(engine: Engine, sampler: Sampler) -> list[int]:
    return list(engine.generate_tokens(PROMPT, 12, sampler))


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_that_all_logits_give(model, way):
    for kwargs in SAMPLERS:
        device = RecordingDevice("f32")
        with Engine(model, _device=device, ctx_size=64, **WAYS[way]) as engine:
            few = written(engine, Sampler(**kwargs))
            assert not [name for name, *_ in device._fetched if name == "logits"], "logits were fetched whole"
            assert ("argmax" if not kwargs else "top_k") in device.bases()
            assert few == written(engine, SeesAll(**kwargs))
            assert len(set(few)) > 1 and [name for name, *_ in device._fetched if name == "logits"]


def test_the_cuda_device_fetches_them_too(model):
    device = CudaDevice(Cupy())
    with Engine(model, _device=device) as engine, Engine(model, device="host") as host:
        assert written(engine, Sampler()) == written(host, Sampler())
        assert {name for name, *_ in device._fetched} == {"ids", "best", "best ids"}


@pytest.mark.parametrize(
    ("sampler", "count"),
    [(Sampler(), 1), (Sampler(temp=1), 40), (Sampler(temp=1, top_k=64), 64), (Sampler(temp=1, top_k=65), 0),
     (Sampler(temp=1, top_k=0), 0), (SeesAll(), 0), (Sampler(temp=0, top_k=0), 1)],
)  # fmt: skip
def test_how_many_logits_decide(sampler, count):
    assert deciding(sampler, 100) == count
    assert deciding(sampler, 39) == (count if count <= 39 else 0)


def test_an_offer_of_a_few_is_chosen_from_as_all_are():
    rng, few = np.random.default_rng(0), 40
    for seed in range(50):
        logits = np.round(rng.normal(0, 2, 500) * 4).astype(np.float32) / 4  # many are equal
        ids = np.argsort(-logits, kind="stable")[:few].astype(np.int32)
        kwargs: dict[str, Any] = {"temp": 0.7, "top_k": few, "top_p": 0.9, "seed": seed}
        assert Offer(logits[ids], ids).taken(Sampler(**kwargs)) == Offer(logits).taken(Sampler(**kwargs))


@pytest.mark.parametrize("kwargs", SAMPLERS[:2])
def test_a_logit_that_is_no_number_is_seen_wherever_it_is(tmp_path, kwargs):
    made = tensors(SHAPE, 2)
    kind, dims, raw = made["output.weight"]
    values = np.frombuffer(raw, np.float32).copy().reshape(dims)
    values[7000] = np.nan
    made["output.weight"] = kind, dims, values.tobytes()
    path = write_gguf(tmp_path / "m.gguf", metadata(SHAPE), made)
    for device in ("host", "emulated"):
        with (
            Engine(path, device=device) as engine,
            pytest.raises(NonFiniteError, match=r"output\.weight, rows from 0 on: .* the first is nan at \[7000, 0\]"),
        ):
            written(engine, Sampler(**kwargs))
