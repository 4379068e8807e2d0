"""The runtime on every architecture that the reference runs: equal to llama.cpp, whatever is resident."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED, TESTS
from latent_model import latent_model
from layouts import Stored, fuse_attention, fuse_experts, interleave_delta, merge_kv_b, rewritten

from moe_cupy.cache import BudgetError
from moe_cupy.engine import Engine
from moe_cupy.kernels.host.matmul import SUPPORTED
from moe_cupy.store import StoreError
from moe_cupy.tools.check import check_model
from moe_ref.architectures import ARCHITECTURES
from moe_ref.gguf import open_gguf
from moe_ref.model import Model

GOLDEN, BUNDLED = SHARED / "data/golden", TESTS / "data/archs"
FILES = [*sorted(BUNDLED.glob("*.gguf")), *sorted(GOLDEN.glob("archs/*.gguf")), *sorted(GOLDEN.glob("quants/*.gguf"))]


def runs(path: Path) -> bool:
    """Whether all matrices are of types that the host has kernels for."""
    with open_gguf(path) as file:
        return {t.type for t in file.tensors.values() if len(t.shape) > 1} <= set(SUPPORTED)


@contextmanager
def smallest(path: Path, **options: Any) -> Iterator[Engine]:
    """An engine with as few slots as it accepts."""
    try:
        engine = Engine(path, cache="slots:0", **options)
    except BudgetError as error:
        engine = Engine(path, cache=f"slots:{str(error).split('slots:')[2].split()[0]}", **options)
    with engine:
        yield engine


def reference(path: Path) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Tokens, strict logits and greedy continuation of a file, from llama.cpp."""
    stem = path.name.removesuffix(".gguf")
    beside = path.with_name(stem + ".npz")
    with np.load(beside if beside.exists() else path.with_name(stem.rsplit(".", 1)[0] + ".npz")) as arrays:
        end = "_deq" if "logits_deq" in arrays.files else ""
        return arrays["tokens"], arrays["logits" + end], arrays["greedy" + end].tolist()


def bundled(name: str) -> Path:
    return BUNDLED / f"{name}.BF16.gguf"


def shared_file(name: str) -> Path:
    return GOLDEN / name if (GOLDEN / name).is_file() else pytest.skip(f"no {name} in {GOLDEN}")


def test_every_architecture_of_the_reference_has_a_file_here_or_in_the_shared_set():
    seen = set()
    for path in FILES:
        with open_gguf(path) as file:
            seen.add(file.metadata["general.architecture"])
    bundled = {"dbrx", "deepseek2", "ernie4_5-moe", "glm4moe", "minimax-m2", "olmoe", "phimoe", "qwen35moe"}
    everywhere = set(ARCHITECTURES) - {"deepseek"}  # deepseek (V1) has no file in either set
    assert seen == (everywhere if GOLDEN.is_dir() else bundled)


@pytest.mark.parametrize("path", [p for p in FILES if runs(p)], ids=lambda p: p.stem)
def test_logits_and_greedy_tokens_equal_llama_cpps_with_all_experts_resident_and_with_the_fewest(path):
    tokens, want, greedy = reference(path)
    with Engine(path, cache="100%") as engine:
        full = engine.logits(tokens)
    with smallest(path, prefetch="next-gate", ubatch_size=5) as engine:
        small = engine.logits(tokens)
        made = list(engine.generate_tokens(tokens.tolist(), len(greedy)))
        engine.reset()
        stepped = np.stack([engine.decode(int(token)).copy() for token in tokens])
        assert engine.stats.evictions or not engine.config.is_moe, "nothing was evicted, so nothing was tested"
    assert np.abs(full - want).max() <= 1e-3 * max(1, want.std())
    assert np.array_equal(full.argmax(1), want.argmax(1))
    assert made == greedy
    assert np.array_equal(small, full), "chunks and evictions must not change a bit"
    assert np.array_equal(stepped, full), "nor must one token at a time"


@pytest.mark.parametrize("name", ["qwen35moe", "kimi-k2", "dbrx"])
def test_check_agrees_with_the_reference(name):
    tokens = np.arange(3, 15)
    with smallest(bundled(name)) as engine:
        outcomes = list(check_model(engine, tokens))
    assert len(outcomes) == 2 and all(o.passed for o in outcomes), outcomes


# Passes that fail


def failing_reads(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    real, count = os.preadv, [0]

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        count[0] += 1
        return 0 if count[0] > after else real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("after", [0, 3, 9])
@pytest.mark.parametrize("name", ["qwen35moe", "deepseek-v2", "minimax-m2"])
def test_a_pass_that_failed_can_be_run_again_and_the_sequence_goes_on_as_if_nothing_had_been(name, after, monkeypatch):
    """A recurrent layer's state has moved on by then in the layers before the one that failed."""
    tokens = np.arange(3, 24)
    with smallest(bundled(name), ubatch_size=5) as engine:
        want = engine.logits(tokens)
        for start in range(8, 14):
            engine.reset()
            engine.prefill(tokens[:start])
            with monkeypatch.context() as patch, pytest.raises(StoreError):
                failing_reads(patch, after)
                engine.prefill(tokens[start:])
            for at in range(engine.kv.length, start + 4):
                assert np.array_equal(engine.decode(int(tokens[at])), want[at]), f"prompt of {start}, token {at}"
            assert np.array_equal(engine.prefill(tokens[at + 1 :]), want[-1]), f"prompt of {start}"


def test_a_new_sequence_does_not_see_the_state_of_the_last(tmp_path):
    tokens = np.arange(3, 17)
    with Engine(bundled("qwen35moe")) as engine:
        want = engine.logits(tokens)
        engine.logits(tokens[::-1])
        engine.decode(5)
        assert np.array_equal(engine.logits(tokens), want)


def without_experts(stored: Stored, layer: int) -> None:
    """This layer gets the dense network of layer 0 in place of its experts."""
    for name in [n for n in stored if n.startswith(f"blk.{layer}.") and ("ffn_" in n or "exp_probs" in n)]:
        if not name.endswith("ffn_norm.weight"):
            del stored[name]
    for part in ("gate", "up", "down"):
        stored[f"blk.{layer}.ffn_{part}.weight"] = stored[f"blk.0.ffn_{part}.weight"]


def test_nothing_is_fetched_for_a_layer_without_experts_whatever_a_prefetcher_says(tmp_path, monkeypatch):
    key = {"ernie4_5-moe.interleave_moe_layer_step": 2}
    path = rewritten(bundled("ernie4_5-moe"), tmp_path / "m.gguf", lambda stored: without_experts(stored, 2), **key)
    tokens = np.arange(20)
    want = Model(path).logits(tokens)
    with Engine(path, cache="100%", prefetch="next-gate") as engine:
        monkeypatch.setattr(engine.forward.prefetcher, "predict", lambda next_ids: [0, 1])
        assert [layer.is_moe for layer in engine.config.layers][1:3] == [True, False]
        got = np.stack([engine.decode(int(token)).copy() for token in tokens])
    assert np.abs(got - want).max() <= 1e-3 * max(1, want.std())


# Files that store the same otherwise


def same_as_reference(path: Path, plain: Path, exact: bool = True) -> None:
    tokens = np.array([5, 9, 200, 31, 7, 7, 300, 2])
    with smallest(path, prefetch="next-gate") as engine, Engine(plain) as other:
        got, want = engine.logits(tokens), other.logits(tokens)
    assert np.abs(got - Model(path).logits(tokens)).max() <= 1e-3 * max(1, want.std())
    assert np.array_equal(got, want) if exact else np.abs(got - want).max() <= 2e-4


@pytest.mark.parametrize("change", [fuse_attention, fuse_experts])
@pytest.mark.parametrize("name", ["olmoe", "glm4moe", "minimax-m2"])
def test_matrices_stored_as_one_compute_the_same(name, change, tmp_path):
    fused = rewritten(bundled(name), tmp_path / "fused.gguf", change)
    with open_gguf(fused) as file:
        assert any("attn_qkv" in n or "gate_up" in n for n in file.tensors)
    same_as_reference(fused, bundled(name))


def test_both_halves_of_a_fused_expert_are_read_from_where_they_lie(tmp_path):
    fused = rewritten(bundled("olmoe"), tmp_path / "fused.gguf", fuse_experts)
    with Engine(fused, cache="100%") as engine, open_gguf(bundled("olmoe")) as plain:
        for name in ("gate", "up", "down"):
            [held] = engine.mover.acquire(1, [3])
            if held.ready is not None:
                held.ready.synchronize()
            tensor = plain.tensors[f"blk.1.ffn_{name}_exps.weight"]
            size = tensor.nbytes // tensor.shape[0]
            assert np.array_equal(held.matrices[name].data, plain.read(tensor.name, 3 * size, size))


def test_latent_attention_of_old_files_computes_the_same(tmp_path):
    tokens = np.arange(12)
    with Engine(latent_model(tmp_path / "new.gguf")) as new, Engine(latent_model(tmp_path / "old.gguf", True)) as old:
        assert np.abs(new.logits(tokens) - old.logits(tokens)).max() <= 2e-4
    keys = {"deepseek2.attention." + key: value for key, value in
            {"key_length": 40, "value_length": 28, "head_count_kv": 4, "key_length_mla": None,
             "value_length_mla": None}.items()}  # fmt: skip
    if (GOLDEN / "archs/deepseek-v3.BF16.gguf").is_file():
        plain = GOLDEN / "archs/deepseek-v3.BF16.gguf"
        same_as_reference(rewritten(plain, tmp_path / "v3.gguf", merge_kv_b, **keys), plain, exact=False)


def test_a_delta_net_whose_projections_are_interleaved_by_head_computes_the_same(tmp_path):
    plain = shared_file("archs/qwen3next.BF16.gguf")
    with open_gguf(plain) as file:
        heads = file.metadata["qwen3next.ssm.group_count"]
    old = rewritten(plain, tmp_path / "old.gguf", lambda stored: interleave_delta(stored, heads))
    same_as_reference(old, plain)


# What needs longer texts than the reference files have: constants made smaller, for the reference too


def test_chunks_and_temperature_count_where_a_text_is_long_enough(monkeypatch):
    path, tokens = shared_file("archs/llama4.BF16.gguf"), np.arange(30)
    with Engine(path) as engine:
        short = engine.logits(tokens)
    monkeypatch.setattr("moe_ref.layers.LLAMA4_CHUNK", 7)
    chunked = equal_to_the_reference(path, tokens)
    assert np.array_equal(chunked[:7], short[:7]) and np.abs(chunked[7:] - short[7:]).max() > 0.1
    monkeypatch.setattr("moe_ref.config.LLAMA4_TEMPERATURE", (0.5, 4, 1.0))
    assert np.abs(equal_to_the_reference(path, tokens) - chunked).max() > 0.1


def test_temperature_of_latent_attention_by_the_files_keys(tmp_path):
    keys = {"deepseek2.attention.temperature_scale": 0.5, "deepseek2.attention.temperature_length": 4}
    tokens = np.arange(20)
    path = rewritten(bundled("deepseek-v2"), tmp_path / "m.gguf", lambda stored: None, **keys)
    got = equal_to_the_reference(path, tokens)
    with Engine(bundled("deepseek-v2")) as engine:
        assert np.abs(engine.logits(tokens)[4:] - got[4:]).max() > 0.05


def equal_to_the_reference(path: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of the runtime at its smallest, in chunks, which are those of moe_ref."""
    want = Model(path).logits(tokens)
    with smallest(path, ubatch_size=4) as engine:
        got = engine.logits(tokens)
    assert np.abs(got - want).max() <= 1e-3 * max(1, want.std())
    return got


def split_in_two(path: Path, folder: Path) -> Path:
    """The tensors of a file dealt out to two parts in turn; returns the first."""
    with open_gguf(path) as file:
        names = list(file.tensors)
    for number in range(2):
        rewritten(path, folder / f"m-{number + 1:05}-of-00002.gguf",
                  lambda stored, number=number: [stored.pop(name) for name in names[1 - number :: 2]],
                  split__no=np.uint16(number), split__count=np.uint16(2),
                  split__tensors__count=np.int32(len(names)))  # fmt: skip
    return folder / "m-00001-of-00002.gguf"


@pytest.mark.parametrize("direct_io", [True, False])
def test_experts_come_from_every_part_of_a_split_file(direct_io, tmp_path):
    first = split_in_two(bundled("olmoe"), tmp_path)
    with smallest(first, direct_io=direct_io) as engine:
        assert {t.file for tensors in engine.mover.layout.layers for t in tensors} == {0, 1}
        got = engine.logits(np.arange(10))
    with Engine(bundled("olmoe")) as engine:
        assert np.array_equal(got, engine.logits(np.arange(10)))


def test_a_part_that_is_cut_short_is_named(tmp_path):
    first = split_in_two(bundled("olmoe"), tmp_path)
    second = tmp_path / "m-00002-of-00002.gguf"
    with smallest(first, direct_io=False) as engine:
        shutil.copy(second, tmp_path / "whole")
        os.truncate(second, second.stat().st_size // 2)
        with pytest.raises(StoreError, match=r"m-00002-of-00002\.gguf: ends at byte"):
            for token in range(40):
                engine.decode(token)


def test_layers_without_experts_have_no_slots(tmp_path):
    with Engine(bundled("deepseek-v2"), cache="100%") as engine:
        layout, c = engine.mover.layout, engine.config
        routed = [layer.is_moe for layer in c.layers]
        assert not all(routed)
        assert [bool(tensors) for tensors in layout.layers] == routed
        assert engine.placement.experts == engine.placement.slots == sum(routed) * c.expert_count
        assert layout.routed_bytes() == sum(t.nbytes for n, t in engine.file.tensors.items() if "_exps.weight" in n)
