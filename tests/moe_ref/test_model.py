"""The whole model against llama.cpp, transformers and PyTorch, and against itself: fed in any way, it says the same."""

from __future__ import annotations

import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHARED, TESTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_ref.model import Model

GOLDEN, ROOT = SHARED / "data/golden", TESTS.parent
ARCHS = {name: f"archs/{name}.{kind}.gguf" for kind, names in {
    "BF16": "qwen3moe qwen3-dense deepseek-v3 gemma4moe gpt-oss llama4 qwen3next",
    "F16": "deepseek-v2-lite granitemoe mixtral qwen2moe", "F32": "llama-dense",
}.items() for name in names.split()}  # fmt: skip
QUANTS = {t: f"quants/qwen3moe-256.{t}.gguf" for t in (
    "Q4_K_M Q5_K_M Q6_K Q8_0 Q4_0 Q5_0 Q2_K Q3_K_M IQ1_S IQ2_XXS IQ2_XS IQ3_XXS IQ4_NL IQ4_XS MXFP4_MOE TQ1_0"
).split()}  # fmt: skip
QUANTS["gpt-oss.MXFP4_MOE"] = "archs/gpt-oss.MXFP4_MOE.gguf"
BUNDLED = {path.name.split(".")[0]: path.name for path in sorted((TESTS / "data/archs").glob("*.gguf"))}
FILES = ARCHS | BUNDLED | QUANTS
TRAINED = {"q4_k_m": "moe-40m-Q4_K_M.gguf", "q8_0": "moe-40m-Q8_0.gguf"}

several = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def found(*candidates: Path) -> Path:
    """The first of these files that exists; skips the test if none does."""
    path = next((p for p in candidates if p.is_file()), None)
    return path or pytest.skip(f"no {candidates[0].name} in {', '.join(str(p.parent) for p in candidates)}")


@cache
def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def golden(name: str) -> tuple[Path, dict[str, np.ndarray], str]:
    """The model file, what llama.cpp says of it, and the suffix of the strict reference: "" or "_deq"."""
    path = found(TESTS / "data/archs" / BUNDLED[name] if name in BUNDLED else GOLDEN / FILES[name])
    npz = path.with_name(f"{name}.npz" if name not in QUANTS else path.name.replace(".gguf", ".npz"))
    return path, arrays(found(npz)), "_deq" if name in QUANTS else ""


def trained(name: str) -> Path:
    return found(ROOT / "data" / name, SHARED / "data/trained" / name)


def observed(model: Model, tokens: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    seen: dict[str, np.ndarray] = {}
    model.observe = seen.__setitem__
    return model.logits(tokens), seen


def greedy(model: Model, tokens: Any, count: int) -> list[int]:
    kv = model.new_cache()
    logits, out = model.forward(tokens, kv), []
    for _ in range(count):
        out.append(int(logits[-1].argmax()))
        logits = model.forward(out[-1:], kv)
    return out


def close(got: np.ndarray, expected: np.ndarray, tolerance: float, context: str) -> None:
    assert got.shape == expected.shape, (context, got.shape, expected.shape)
    error = np.abs(got - expected)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    assert error[worst] <= tolerance, (
        f"{context}, shape {got.shape}: err/tol {error[worst] / tolerance:.3g} at {worst}: "
        f"{got[worst]}, expected {expected[worst]}"
    )


def strict(expected: np.ndarray) -> float:
    """The README's measure: llama.cpp and transformers agree to a tenth of it."""
    return 1e-3 * max(1.0, float(expected.std()))


# ---------------------------------------------------------------------------------------------------------
# Against other implementations


@pytest.mark.parametrize("name", FILES)
def test_logits_equal_llama_cpp_and_the_best_token_is_the_same_everywhere(name):
    path, reference, suffix = golden(name)
    expected = reference["logits" + suffix]
    logits = Model(path).logits(reference["tokens"])
    assert logits.dtype == np.float32
    close(logits, expected, strict(expected), f"{name} logits{suffix}")
    differ = np.flatnonzero(logits.argmax(-1) != expected.argmax(-1))
    assert not differ.size, f"{name}: another best token at positions {differ}"


@pytest.mark.parametrize("name", [*ARCHS, *(name for name in BUNDLED if name != "phimoe")])
def test_logits_equal_transformers(name):
    """All but phimoe, whose norms and routing llama.cpp computes otherwise (shared/CONVENTIONS.md)."""
    path, reference, _ = golden(name)
    logits = Model(path).logits(reference["tokens"])
    close(logits, reference["logits_transformers"], 1e-3, f"{name} against transformers")


@pytest.mark.parametrize("name", FILES)
def test_sixteen_greedy_tokens_equal_llama_cpp(name):
    path, reference, suffix = golden(name)
    got, expected = greedy(Model(path), reference["tokens"], 16), reference["greedy" + suffix].tolist()
    assert got == expected, f"{name}; distances to the runner-up {reference[f'greedy{suffix}_gap']}"


@pytest.mark.parametrize("name", FILES)
def test_each_layer_and_each_route_equals_llama_cpp(name):
    path, reference, _ = golden(name)
    model = Model(path)
    _, seen = observed(model, reference["tokens"])
    layers, c = range(model.config.block_count), model.config
    routed = {f"mid/ffn_moe_topk-{n}" for n in layers if c.layers[n].is_moe}
    assert {key for key in reference if key.startswith("mid/")} == routed | {f"mid/l_out-{n}" for n in layers}
    for n in layers:
        expected = reference[f"mid/l_out-{n}"]
        close(seen[f"l_out-{n}"], expected, strict(expected), f"{name} l_out-{n}")
    for key in sorted(routed):
        wrong = np.argwhere(seen[key[4:]] != reference[key])
        assert not wrong.size, f"{name} {key}: first of {len(wrong)} other experts at [token, rank] {wrong[0]}"
    for n in layers if c.is_moe and c.renormalise else ():
        if c.layers[n].is_moe:
            total = seen[f"ffn_moe_weights-{n}"].sum(-1)
            close(total, np.full(len(total), c.expert_weights_scale), 1e-5, f"{name}: weights of layer {n} add up")


@pytest.mark.parametrize("name", ARCHS)
def test_160_positions_and_eight_more_tokens_equal_llama_cpp(name):
    long = arrays(found(GOLDEN / "long160.npz"))
    tokens, expected = long[f"{name}/tokens"], long[f"{name}/logits_last16"]
    model = Model(golden(name)[0])
    close(model.logits(tokens)[-16:], expected, strict(expected), f"{name}, last 16 of {len(tokens)}")
    assert greedy(model, tokens, 8) == long[f"{name}/greedy"].tolist()


@pytest.mark.parametrize("name", TRAINED)
def test_trained_model_equals_pytorch_on_the_same_weights(name):
    """README: a separate NumPy forward pass meets these logits within 1.4e-5; ten times that, and no expert differs."""
    reference = arrays(found(SHARED / "data/trained/moe-40m-reference.npz"))
    model = Model(trained(TRAINED[name]))
    for i, tokens in enumerate(reference["tokens"]):
        logits, seen = observed(model, tokens)
        close(logits, reference[f"logits_{name}"][i], 1.4e-4, f"{name}, passage {i}")
        routes = np.stack([seen[f"ffn_moe_topk-{n}"] for n in range(model.config.block_count)], axis=1)
        wrong = np.argwhere(routes != reference[f"experts_{name}"][i])
        assert not wrong.size, f"{name}, passage {i}: other experts at [token, layer, rank] {wrong[:5].tolist()}"


@pytest.mark.parametrize("name", FILES)
def test_float64_run_is_close_to_float32_and_to_llama_cpp(name):
    path, reference, suffix = golden(name)
    single, double = (Model(path, dtype=t).logits(reference["tokens"]) for t in (np.float32, np.float64))
    assert (single.dtype, double.dtype) == (np.float32, np.float64)
    assert np.abs(single - double).max() > 1e-9, f"{name}: float64 gave float32's result, so it was not used throughout"
    close(single, double, strict(double) / 10, f"{name}: float32 against float64")
    close(double, reference["logits" + suffix], strict(double) / 10, f"{name}: float64 against llama.cpp")


# ---------------------------------------------------------------------------------------------------------
# Against itself


@cache
def both_precisions(name: str) -> tuple[Model, Model, np.ndarray, np.ndarray, np.ndarray]:
    path, reference, _ = golden(name)
    models = [Model(path, dtype=t) for t in (np.float32, np.float64)]
    return *models, reference["tokens"], *(m.logits(reference["tokens"]) for m in models)


def in_chunks(model: Model, tokens: np.ndarray, cuts: list[int]) -> np.ndarray:
    kv, edges = model.new_cache(), [0, *sorted(cuts), len(tokens)]
    return np.concatenate([model.forward(tokens[a:b], kv) for a, b in zip(edges[:-1], edges[1:], strict=True)])


def check_chunks(name: str, cuts: list[int]) -> None:
    """Chunking changes only the order of sums. One order is off by E = |float32 - float64|, so two by 2E; 4E here.

    In float64 the same errors are 2**-29 as large, which leaves no room for a wrong position or mask.
    """
    single, double, tokens, batch, exact = both_precisions(name)
    rounding = float(np.abs(batch - exact).max())
    close(in_chunks(single, tokens, cuts), batch, 4 * rounding, f"{name} float32, cut at {cuts}")
    close(in_chunks(double, tokens, cuts), exact, 16 * rounding * 2.0**-29, f"{name} float64, cut at {cuts}")


@pytest.mark.parametrize("name", FILES)
def test_one_token_at_a_time_equals_one_batch(name):
    check_chunks(name, list(range(1, 24)))


@pytest.mark.parametrize("name", ["qwen3moe", "qwen3-dense", "Q4_K_M"])
@several
@given(cuts=st.sets(st.integers(1, 23), max_size=8))
def test_any_chunking_equals_one_batch(name, cuts):
    check_chunks(name, list(cuts))


@pytest.mark.parametrize("name", ["qwen3moe", "qwen3-dense"])
def test_a_later_token_never_changes_earlier_logits(name):
    _, double, tokens, _, exact = both_precisions(name)
    for t in (1, 12, 23):
        changed = tokens.copy()
        changed[t:] = (changed[t:] + 1 + np.arange(24 - t)) % double.config.vocab_size
        logits = double.logits(changed)
        close(logits[:t], exact[:t], 1e-11, f"{name}: positions before {t}, where tokens changed")
        assert (np.abs(logits[t:] - exact[t:]).max(-1) > 1e-3).all(), f"{name}: positions from {t} on see no change"


def test_two_sequences_do_not_disturb_each_other():
    model, _, tokens, *_ = both_precisions("qwen3moe")
    one, other = model.new_cache(), model.new_cache()
    apart = [in_chunks(model, part, list(range(1, 12))) for part in (tokens[:12], tokens[12:])]
    mixed = [(model.forward(tokens[i : i + 1], one), model.forward(tokens[12 + i : 13 + i], other)) for i in range(12)]
    for i, expected in enumerate(apart):
        assert np.array_equal(np.concatenate([pair[i] for pair in mixed]), expected), f"sequence {i}"


BAD_TOKENS = [[], [-1], [384], [3, 384, 3], [3, -1], [[1, 2]], 5, [2**31], [2**70], [1.5], ["a"]]


@pytest.mark.parametrize("tokens", BAD_TOKENS, ids=repr)
def test_bad_token_ids_are_a_valueerror_and_leave_the_cache_alone(tokens):
    model = both_precisions("qwen3moe")[0]
    kv = model.new_cache()
    model.forward([7, 8], kv)
    with pytest.raises(ValueError, match=r"^tokens: "):
        model.forward(tokens, kv)
    assert kv.length == 2
    assert np.array_equal(model.forward([9], kv), in_chunks(model, np.array([7, 8, 9]), [2])[2:])


# ---------------------------------------------------------------------------------------------------------
# What is read, decoded and kept


def spied(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every read of tensor bytes from now on: name, start, size."""
    reads: list[tuple[str, int, int]] = []
    read = model.file.read

    def spy(name: str, start: int = 0, nbytes: int | None = None) -> np.ndarray:
        raw = read(name, start, nbytes)
        reads.append((name, start, len(raw)))
        return raw

    monkeypatch.setattr(model.file, "read", spy)
    return reads


def test_opening_a_model_reads_no_tensor(monkeypatch):
    path, opened = golden("Q4_K_M")[0], []
    monkeypatch.setattr("moe_ref.gguf.GGUFFile.read", lambda self, name, *_: opened.append(name))
    Model(path).new_cache()
    assert opened == []


@pytest.mark.parametrize("name", ["qwen3moe", "Q4_K_M", "trained"])
def test_one_token_reads_its_own_k_experts_of_each_layer_and_no_other(name, monkeypatch):
    model = Model(trained(TRAINED["q4_k_m"]) if name == "trained" else golden(name)[0])
    reads, c = spied(model, monkeypatch), model.config
    _, seen = observed(model, [5])
    for layer in range(c.block_count):
        chosen = sorted(seen[f"ffn_moe_topk-{layer}"][0].tolist())
        assert len(chosen) == c.expert_used_count < c.expert_count
        for part in ("gate", "up", "down"):
            tensor = f"blk.{layer}.ffn_{part}_exps.weight"
            size = model.file.tensors[tensor].nbytes // c.expert_count
            touched = sorted((start, n) for t, start, n in reads if t == tensor)
            assert touched == [(e * size, size) for e in chosen], f"{tensor}: chosen {chosen}, read {touched}"
    embedding = model.file.tensors["token_embd.weight"].nbytes
    rows = [(5 * embedding // c.vocab_size, embedding // c.vocab_size)]  # one row, and all of it if it is the head too
    whole = [(0, embedding)] if model.output_name == "token_embd.weight" else []
    assert [(start, n) for t, start, n in reads if t == "token_embd.weight"] == rows + whole
    assert len(reads) == len(set(reads)), f"read twice: {sorted(r for r in set(reads) if reads.count(r) > 1)}"
    reads.clear()
    model.logits([5])
    assert reads == [], "a second time, all of it is still decoded"


@pytest.mark.parametrize("name", ["qwen3moe", "Q4_K_M"])
@pytest.mark.parametrize("keep_bytes", [0, 40_000, 300_000, 2_000_000])
def test_decoded_copies_stay_within_keep_bytes_and_change_no_logit(name, keep_bytes, monkeypatch):
    import moe_ref.weights as weights

    path, reference, _ = golden(name)
    expected, decoded, decode = Model(path).logits(reference["tokens"]), [], weights.dequantize

    def remember(*args: Any) -> np.ndarray:
        array = decode(*args)
        decoded.append(weakref.ref(array))
        return array

    monkeypatch.setattr(weights, "dequantize", remember)
    model = Model(path, keep_bytes=keep_bytes)
    reads = spied(model, monkeypatch)
    for _ in range(2):
        assert np.array_equal(model.logits(reference["tokens"]), expected), f"{name}, keep_bytes {keep_bytes}"
        alive = [array for ref in decoded if (array := ref()) is not None]
        kept = sum(array.nbytes for array in alive)
        assert kept <= keep_bytes, f"{name}: {kept} bytes of {len(alive)} arrays live on, {keep_bytes} allowed"
        assert kept > keep_bytes / 2 or keep_bytes < 100_000, f"{name}: room for {keep_bytes} bytes, only {kept} kept"
        del alive
    if keep_bytes == 0:
        assert sorted(reads[: len(reads) // 2]) == sorted(reads[len(reads) // 2 :]), "all is read again"
