"""Perplexity: losses by hand, the rules of chunks, and the figures of the trained model's README."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from moe_ref.model import Model
from moe_ref.perplexity import chunk, chunk_loss, perplexity
from moe_ref.tokenizer import load_tokenizer
from tests.slow_shares import mostly_slow

ROOT = Path(__file__).resolve().parents[2]
README = {"moe-40m-Q4_K_M.gguf": (3.68775, 39.955), "moe-40m-Q8_0.gguf": (3.68529, 39.857)}


def trained(name: str) -> Path:
    """A file of the trained model, from data/ or the shared folder; skips the test where it is absent."""
    places = [ROOT / "data", SHARED / "data/trained"]
    path = next((p / name for p in places if (p / name).is_file()), None)
    return path or pytest.skip(f"no {name} in {', '.join(map(str, places))}")


@cache
def valid_chunks(name: str) -> np.ndarray:
    """The README's protocol: valid.txt without special tokens, in chunks of 256."""
    with Model(trained(name)).file as file:
        text = trained("valid.txt").read_bytes().decode("utf-8")
        return chunk(load_tokenizer(file.metadata).encode(text, add_special=False, parse_special=False), 256)


# ---------------------------------------------------------------------------------------------------------
# Loss


def test_loss_of_probabilities_in_eighths_is_by_hand():
    """Token 1 after token 0 had 2/8, then token 2 had 5/8; the first token and the last logits do not count."""
    logits = np.log(np.float64([[1, 2, 5], [2, 1, 5], [1, 1, 6]]) / 8)
    got = chunk_loss(logits, np.array([0, 1, 2]))
    np.testing.assert_allclose(got, [math.log(4), math.log(8 / 5)], rtol=1e-15)
    logits[-1] = np.nan
    assert np.array_equal(chunk_loss(logits, np.array([2, 1, 2])), got), "depends on the first token or the last logits"


@pytest.mark.parametrize("vocabulary", [1, 2, 4096])
@pytest.mark.parametrize("level", [0.0, -3e4, 3e38])
def test_loss_of_equal_logits_is_the_logarithm_of_the_vocabulary(vocabulary, level):
    got = chunk_loss(np.full((4, vocabulary), level, np.float32), np.array([0, vocabulary - 1, 0, vocabulary // 2]))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, [math.log(vocabulary)] * 3, rtol=1e-14, atol=1e-300)


def test_loss_of_a_certain_and_of_an_impossible_token():
    logits = np.float32([[0, -np.inf], [0, -1000], [0, 0]])
    assert chunk_loss(logits, np.array([0, 0, 1])).tolist() == [0.0, 1000.0]
    assert chunk_loss(logits, np.array([0, 1, 0])).tolist() == [np.inf, 0.0]


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(1, 40), st.sampled_from([0.1, 5.0, 300.0]))
def test_loss_equals_summing_one_exponential_at_a_time(seed, n_tokens, vocabulary, size):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((n_tokens, vocabulary)) * size).astype(np.float32)
    tokens = rng.integers(0, vocabulary, n_tokens)
    pairs = zip(logits[:-1].astype(float), tokens[1:], strict=True)
    expected = [np.logaddexp.reduce(row - row[after]) for row, after in pairs]
    np.testing.assert_allclose(
        chunk_loss(logits, tokens), expected, rtol=1e-12, atol=1e-12, err_msg=f"seed {seed}, {logits.shape}, x{size}"
    )


# ---------------------------------------------------------------------------------------------------------
# Chunks


@given(st.integers(2, 40), st.integers(0, 200))
def test_chunks_are_consecutive_whole_and_without_the_rest(size, count):
    tokens = list(range(1000, 1000 + count))
    if count < size:
        with pytest.raises(ValueError, match=f"{count} tokens, fewer than one chunk of {size}"):
            chunk(tokens, size)
        return
    got = chunk(tokens, size)
    assert got.shape == (count // size, size) and got.ravel().tolist() == tokens[: count // size * size]


@pytest.mark.parametrize("size", [1, 0, -5])
def test_a_chunk_of_fewer_than_two_tokens_is_refused(size):
    with pytest.raises(ValueError, match=f"-c {size}: a chunk needs at least 2 tokens"):
        chunk([1, 2, 3], size)


def test_perplexity_is_the_mean_over_tokens_of_chunks_each_alone():
    """One token scored at ln 2 and three at ln 4: (ln 2 + 3 ln 4) / 4 = 7/4 ln 2; a mean of chunks would say 3/2."""
    calls = []

    def logits(tokens: np.ndarray) -> np.ndarray:
        calls.append(tokens.tolist())
        return np.zeros((len(tokens), len(tokens)), np.float32)

    got = perplexity(logits, iter([np.array([0, 1]), np.array([3, 2, 1, 0])]))
    assert calls == [[0, 1], [3, 2, 1, 0]]
    assert got["tokens"] == 4 and got["nll"] == pytest.approx(7 / 4 * math.log(2), rel=1e-15)
    assert got["ppl"] == pytest.approx(2 ** (7 / 4), rel=1e-14)


# ---------------------------------------------------------------------------------------------------------
# The trained model


class Independent:
    """Qwen3-MoE once more, in float64: gguf-py reads and decodes, complex numbers rotate, each head is on its own."""

    def __init__(self, path: Path):
        reader = gguf.GGUFReader(path)
        self.key = {k.partition(".")[2]: f.contents() for k, f in reader.fields.items() if k.startswith("qwen3moe.")}
        self.w = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(float) for t in reader.tensors}

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        root = np.sqrt((x**2).sum(-1, keepdims=True) / x.shape[-1] + self.key["attention.layer_norm_rms_epsilon"])
        return x / root * self.w[f"{name}_norm.weight"]

    def heads(self, x: np.ndarray, name: str) -> np.ndarray:
        """Normed and rotated heads, [H, T, K]."""
        x = np.stack(np.split(x @ self.w[f"{name}.weight"].T, self.w[f"{name}.weight"].shape[0] // self.width, axis=1))
        z = self.norm(x, name)
        z = z[..., : self.width // 2] + 1j * z[..., self.width // 2 :]
        frequency = self.key["rope.freq_base"] ** (-np.arange(0, self.width, 2) / self.width)
        z = z * np.exp(1j * np.outer(np.arange(x.shape[1]), frequency))
        return np.concatenate([z.real, z.imag], axis=-1)

    @property
    def width(self) -> int:
        return self.key["attention.key_length"]

    def attention(self, x: np.ndarray, block: str) -> np.ndarray:
        q, k = self.heads(x, f"{block}.attn_q"), self.heads(x, f"{block}.attn_k")
        v = np.split(x @ self.w[f"{block}.attn_v.weight"].T, len(k), axis=1)
        out = []
        for h in range(len(q)):
            group = h * len(k) // len(q)
            p = np.tril(np.exp(q[h] @ k[group].T / math.sqrt(self.width)))  # scores are small: no need to shift
            out.append(p / p.sum(-1, keepdims=True) @ v[group])
        return np.concatenate(out, axis=1) @ self.w[f"{block}.attn_output.weight"].T

    def experts(self, x: np.ndarray, block: str) -> np.ndarray:
        p = np.exp(x @ self.w[f"{block}.ffn_gate_inp.weight"].T)
        least = np.sort(p, axis=-1)[:, -self.key["expert_used_count"], None]
        p = np.where(p >= least, p, 0)  # softmax, then renormalised over the chosen: the same as over the chosen alone
        p /= p.sum(-1, keepdims=True)
        gate, up, down = (self.w[f"{block}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
        out = np.zeros_like(x)
        for e in range(p.shape[1]):
            rows = p[:, e] > 0
            g = x[rows] @ gate[e].T
            out[rows] += p[rows, e, None] * ((g / (1 + np.exp(-g)) * (x[rows] @ up[e].T)) @ down[e].T)
        return out

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        x = self.w["token_embd.weight"][tokens]
        for n in range(self.key["block_count"]):
            x = x + self.attention(self.norm(x, f"blk.{n}.attn"), f"blk.{n}")
            x = x + self.experts(self.norm(x, f"blk.{n}.ffn"), f"blk.{n}")
        p = np.exp(self.norm(x, "output") @ self.w["token_embd.weight"].T)[:-1]
        return -np.log(p[np.arange(len(p)), tokens[1:]] / p.sum(-1))


@pytest.mark.parametrize("name", README)
def test_first_chunks_of_the_trained_model_equal_an_independent_float64_model(name):
    """The first chunk in float64, token by token; eight in float32, in the mean.

    Loss follows logits, which differ by 1.4e-5 (README) unless a router was near a tie: then one token may move by far
    more, the mean of 2040 by little (README: 0.001 is noise).
    """
    independent, chunks = Independent(trained(name)), valid_chunks(name)[:8]
    expected = np.array([independent.losses(tokens) for tokens in chunks])
    exact = chunk_loss(Model(trained(name), dtype=np.float64).logits(chunks[0]), chunks[0])
    worst = int(np.abs(exact - expected[0]).argmax())
    found = f"{name}, token {worst + 1}: {exact[worst]}, expected {expected[0, worst]}"
    assert abs(exact[worst] - expected[0, worst]) < 1e-9, found
    got = perplexity(Model(trained(name)).logits, chunks)
    assert got["tokens"] == expected.size == 8 * 255
    assert abs(got["nll"] - expected.mean()) < 1e-4, f"{name}: {got}, expected {expected.mean():.6f}"


@pytest.mark.parametrize("name", mostly_slow(README, "moe-40m-Q4_K_M.gguf", seconds=10))
def test_perplexity_of_the_whole_validation_text_is_the_readme_s(name):
    nll, ppl = README[name]
    chunks = valid_chunks(name)
    assert chunks.shape == (123, 256), "31497 tokens"
    got = perplexity(Model(trained(name)).logits, chunks)
    assert got["tokens"] == 31_365
    assert abs(got["ppl"] / ppl - 1) < 1e-3 and abs(got["nll"] - nll) < 1e-3, f"{name}: {got}, README {nll} {ppl}"
