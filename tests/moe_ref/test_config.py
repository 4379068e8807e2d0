"""What the metadata and the tensors must say before a model runs; every refusal names the key or the tensor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf_writer import write_gguf
from hypothesis import given
from hypothesis import strategies as st

from moe_ref.config import ARCHITECTURES, ConfigError, ModelConfig, load_config
from moe_ref.gguf import GGUFError, open_gguf
from moe_ref.model import Model
from moe_ref.quants import FORMATS, FormatError
from moe_ref.tensors import expected_shapes

MOE = {
    "general.architecture": "qwen3moe",
    "qwen3moe.block_count": 2,
    "qwen3moe.embedding_length": 24,
    "qwen3moe.context_length": 100,
    "qwen3moe.attention.head_count": 6,
    "qwen3moe.attention.head_count_kv": 2,
    "qwen3moe.attention.key_length": 10,
    "qwen3moe.attention.value_length": 7,
    "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen3moe.rope.freq_base": 1e6,
    "qwen3moe.rope.dimension_count": 8,
    "qwen3moe.expert_count": 5,
    "qwen3moe.expert_used_count": 3,
}
OPTIONAL = {
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base",
    "rope.dimension_count",
}  # fmt: skip
NUMBERS = [key.partition(".")[2] for key in MOE if key.startswith("qwen3moe.")]
REAL = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
WHOLE = [key for key in NUMBERS if key not in REAL]
REQUIRED = [key for key in NUMBERS if key not in OPTIONAL]


def config(without: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    """MOE's config with keys left out or changed ("__" stands for a dot)."""
    metadata = MOE | {f"qwen3moe.{key.replace('__', '.')}": value for key, value in changes.items()}
    return load_config({k: v for k, v in metadata.items() if k.removeprefix("qwen3moe.") not in without}, 11)


def test_every_number_is_read_from_its_key():
    c = config()
    assert (c.architecture, c.block_count, c.embedding_length, c.context_length) == ("qwen3moe", 2, 24, 100)
    assert (c.head_count, c.head_count_kv, c.key_length, c.value_length) == (6, 2, 10, 7)
    assert (c.rope_dimension_count, c.rope_freq_base, c.norm_epsilon) == (8, 1e6, 1e-6)
    assert (c.expert_count, c.expert_used_count, c.expert_weights_scale, c.vocab_size) == (5, 3, 1.0, 11)
    assert c.attention_scale == pytest.approx(1 / np.sqrt(10), rel=1e-15)
    assert (c.quirks.rope, c.qk_norm, c.is_moe) == ("neox", "head", True)
    assert (c.gating, c.renormalise) == ("softmax", True)


def test_optional_keys_have_llama_cpp_defaults():
    c = config(without=tuple(OPTIONAL))
    assert (c.head_count_kv, c.key_length, c.value_length) == (6, 4, 4)  # heads; width / heads twice
    assert (c.rope_dimension_count, c.rope_freq_base, c.expert_weights_scale) == (4, 10000.0, 1.0)
    assert config(without=("rope.dimension_count",)).rope_dimension_count == 10  # the key length, wherever it came from
    assert config(without=("attention.value_length",)).value_length == 4  # not the key length


@pytest.mark.parametrize(("stored", "meaning"), [(0.0, 1.0), (1.0, 1.0), (0, 1.0), (2.5, 2.5), (16, 16.0)])
def test_expert_weights_scale_of_zero_means_none(stored, meaning):
    glm = {key.replace("qwen3moe", "glm4moe"): value for key, value in MOE.items()}
    glm |= {"general.architecture": "glm4moe", "glm4moe.expert_weights_scale": stored}
    assert load_config(glm, 11).expert_weights_scale == meaning


def test_a_dense_architecture_needs_no_expert_keys():
    dense = {k.replace("qwen3moe", "qwen3"): v for k, v in MOE.items() if ".expert_" not in k}
    c = load_config(dense | {"general.architecture": "qwen3"}, 11)
    assert (c.is_moe, c.expert_count, c.expert_used_count) == (False, 0, 0)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_required_key_is_named(key):
    with pytest.raises(ConfigError, match=rf"^qwen3moe\.{key}: missing"):
        config(without=(key,))


@pytest.mark.parametrize("key", NUMBERS)
def test_a_value_that_is_no_number_in_range_is_refused_naming_its_key(key):
    for value in ("7", [2], True, -1, -0.5, 2**40, 1e30):  # an array of one number is short of two layers
        with pytest.raises(ConfigError, match=rf"^qwen3moe\.{key}: "):
            config(**{key: value})


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("keys", [REAL, WHOLE], ids=["real", "whole"])
def test_a_number_that_is_not_finite_is_refused_naming_its_key(keys, value):
    for key in keys:
        with pytest.raises(ConfigError, match=rf"^qwen3moe\.{key}: "):
            config(**{key: value})


@pytest.mark.parametrize("value", [2.5, 0])
@pytest.mark.parametrize("key", WHOLE)
def test_a_count_that_is_zero_or_broken_is_refused_naming_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"^qwen3moe\.{key}: .*{value}"):
        config(**{key: value})


@pytest.mark.parametrize(
    ("changes", "key", "found"),
    [
        ({"attention__head_count_kv": 4}, "attention.head_count", "6 is not a multiple of .*head_count_kv 4"),
        ({"attention__head_count_kv": 12}, "attention.head_count", "6 is not a multiple of .*head_count_kv 12"),
        ({"rope__dimension_count": 7}, "rope.dimension_count", "7 must be even and at most .*key_length 10"),
        ({"rope__dimension_count": 12}, "rope.dimension_count", "12 must be even and at most .*key_length 10"),
        ({"expert_used_count": 6}, "expert_used_count", "6 exceeds expert_count 5"),
    ],
)
def test_keys_that_contradict_each_other_are_refused_with_both_numbers(changes, key, found):
    with pytest.raises(ConfigError, match=rf"^qwen3moe\.{key}: {found}"):
        config(**changes)


@pytest.mark.parametrize(("key", "value"), [("rope.scaling.type", "spiral"), ("attn_logit_softcapping", 50.0)])
def test_a_feature_not_implemented_is_refused_with_its_value(key, value):
    with pytest.raises(ConfigError, match=rf"^qwen3moe\.{key}: ") as caught:
        config(**{key: value})
    assert repr(value) in str(caught.value)


def test_a_feature_switched_off_explicitly_is_accepted():
    assert config(rope__scaling__type="none", attn_logit_softcapping=0.0) == config()


IGNORED = {"expert_gating_func": 2, "expert_weights_norm": False, "attention.sliding_window": 4096, "logit_scale": 7.0,
           "expert_weights_scale": 2.5, "attention.scale": 0.3, "leading_dense_block_count": 1}  # fmt: skip


@pytest.mark.parametrize("key", IGNORED)
def test_a_key_that_llama_cpp_does_not_read_for_this_architecture_changes_nothing_and_is_named(key):
    """Checked against llama.cpp: qwen3moe files that differ by such a key have the same logits there."""
    with pytest.warns(UserWarning, match=rf"^qwen3moe\.{key}: .*{IGNORED[key]!r} has no effect for qwen3moe"):
        assert config(**{key: IGNORED[key]}) == config()


GEMMA4 = {"general.architecture": "gemma4"} | {
    f"gemma4.{key}": value for key, value in {
        "block_count": 2, "embedding_length": 24, "context_length": 100, "attention.head_count": 2,
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.sliding_window": 8, "attention.sliding_window_pattern": 2,
    }.items()
}  # fmt: skip


def test_gemma4_caps_its_logits_at_30_where_the_key_is_absent_and_not_at_all_where_it_is_0():
    assert load_config(GEMMA4, 11).final_logit_softcapping == 30
    assert load_config(GEMMA4 | {"gemma4.final_logit_softcapping": 0.0}, 11).final_logit_softcapping == 0


def test_gemma4_without_experts_has_dense_layers_and_no_router():
    tensors = {f"blk.{i}.ffn_up.weight": SimpleNamespace(shape=(16, 24)) for i in range(2)}
    file: Any = SimpleNamespace(path="", tensors=tensors)
    shapes = expected_shapes(load_config(GEMMA4, 11), file)
    assert shapes["blk.1.ffn_gate.weight"] == (16, 24) and not [name for name in shapes if "ffn_gate_inp" in name]


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_rope_scaling_factor_without_a_type_is_linear_as_in_llama_cpp(key):
    """llama-model.cpp, load_hparams: the default type is linear, and the older key counts where the newer is absent."""
    rope = config(**{key: 4.0}).layers[0].rope
    assert (rope.factor, rope.yarn, rope.magnitude) == (4.0, False, 1.0)


@pytest.mark.parametrize("value", [None, 3, "mamba", "gpt_oss", "QWEN3MOE", ""])
def test_an_unknown_architecture_is_refused_with_the_known_ones(value):
    with pytest.raises(ConfigError, match=r"^general\.architecture: ") as caught:
        load_config(MOE | {"general.architecture": value}, 11)
    if isinstance(value, str):
        assert repr(value) in str(caught.value) and all(name in str(caught.value) for name in ARCHITECTURES)


WORDS = st.one_of(st.text("ab 1.", max_size=5), st.booleans(), st.lists(st.integers(), max_size=3))
ANYTHING = st.one_of(st.integers(-(2**63), 2**64), st.integers(0, 12), st.floats(), WORDS)


@given(st.dictionaries(st.sampled_from([*MOE, "qwen3moe.rope.scaling.type"]), ANYTHING, max_size=4))
def test_any_metadata_gives_a_consistent_config_or_configerror_naming_a_key(changes):
    metadata = MOE | changes
    try:
        c = load_config(metadata, 11)
    except ConfigError as error:
        assert str(error).partition(": ")[0] in metadata, f"{changes}: names no key: {error}"
    else:
        assert c.head_count % c.head_count_kv == 0 and 1 <= c.expert_used_count <= c.expert_count, changes
        assert c.rope_dimension_count % 2 == 0 and 2 <= c.rope_dimension_count <= c.key_length, changes


# ---------------------------------------------------------------------------------------------------------
# Tensors, in files

WIDTH, VOCAB, INNER = 24, 11, 9


def shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """What a file of MOE's numbers holds, in NumPy order; written out, not computed by the package."""
    out: dict[str, tuple[int, ...]] = {"token_embd.weight": (11, 24), "output_norm.weight": (24,)}
    for layer in range(2):
        block = f"blk.{layer}."
        out |= {block + "attn_norm.weight": (24,), block + "ffn_norm.weight": (24,)}
        out |= {block + "attn_q.weight": (60, 24), block + "attn_k.weight": (20, 24), block + "attn_v.weight": (14, 24)}
        out |= {block + "attn_output.weight": (24, 42)}
        out |= {block + "attn_q_norm.weight": (10,), block + "attn_k_norm.weight": (10,)}
        if architecture == "qwen3moe":
            out |= {block + "ffn_gate_inp.weight": (5, 24), block + "ffn_gate_exps.weight": (5, 9, 24)}
            out |= {block + "ffn_up_exps.weight": (5, 9, 24), block + "ffn_down_exps.weight": (5, 24, 9)}
        else:
            out |= {block + "ffn_gate.weight": (9, 24), block + "ffn_up.weight": (9, 24)}
            out |= {block + "ffn_down.weight": (24, 9)}
    return out


def tensor(shape: tuple[int, ...], type_name: str = "F32") -> tuple[str, tuple[int, ...], bytes]:
    if type_name == "I8":
        return type_name, shape, bytes(int(np.prod(shape)))
    rng = np.random.default_rng(int(np.prod(shape)))
    return type_name, shape, rng.standard_normal(shape).astype("<f4").tobytes()


def written(path: Path, architecture: str = "qwen3moe", metadata: dict | None = None, **tensors: Any) -> Path:
    """A small whole model in F32; ``tensors`` replaces some by (shape, type) or, with None, leaves them out."""
    keys = {k.replace("qwen3moe", architecture): v for k, v in MOE.items()} | (metadata or {})
    all_of_it: dict[str, Any] = {name: (shape,) for name, shape in shapes(architecture).items()} | tensors
    kept = {name: tensor(*spec) for name, spec in all_of_it.items() if spec is not None}
    return write_gguf(path / "m.gguf", keys | {"general.architecture": architecture}, kept)


NAMES = [(a, name) for a in ("qwen3moe", "qwen3") for name in shapes(a) if "blk.0" not in name]


@pytest.mark.parametrize("architecture", ["qwen3moe", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_small_file_runs(tmp_path, architecture, tied):
    head = {} if tied else {"output.weight": ((VOCAB, WIDTH),)}
    model = Model(written(tmp_path, architecture, **head))
    assert (model.config.vocab_size, model.output_name == "token_embd.weight") == (VOCAB, tied)
    logits = model.logits([1, 2, 10])
    assert logits.shape == (3, VOCAB) and logits.dtype == np.float32 and np.isfinite(logits).all()


@pytest.mark.parametrize(("architecture", "name"), NAMES)
def test_a_missing_tensor_is_refused_by_name(tmp_path, architecture, name):
    path = written(tmp_path, architecture, **{name: None})
    with pytest.raises(ConfigError, match=f"^{name}: missing from .*m.gguf"):
        Model(path)


@pytest.mark.parametrize(("architecture", "name"), NAMES)
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path, architecture, name):
    shape = shapes(architecture)[name]
    if name == "token_embd.weight":  # its rows are the vocabulary, whatever their number
        wrong = [(VOCAB, WIDTH + 1)]
    else:
        wrong = [(shape[0] + 1, *shape[1:]), (2, *shape), (*shape[:-1], shape[-1] - 1)]
    for bad in wrong:
        path = written(tmp_path, architecture, **{name: (bad,)})
        with pytest.raises(ConfigError, match=r"^[\w.]+: (shape|missing)") as caught:
            Model(path)
        message = str(caught.value)
        if "ffn_down_exps" in name or "ffn_up.weight" in name:  # F is read off this one: another may be blamed
            assert message.startswith(name.partition(".ffn")[0]), message
        else:
            assert message.startswith(f"{name}: shape {list(bad)}") and str(list(shape)) in message, message


@pytest.mark.parametrize(("architecture", "name"), [pair for pair in NAMES if "token_embd" not in pair[1]])
def test_a_leading_dimension_of_one_changes_nothing(tmp_path, architecture, name):
    """ggml has four dimensions always; ernie's exp_probs_b.bias is stored with two."""
    plain = Model(written(tmp_path, architecture)).logits([1, 2, 10])
    shape = shapes(architecture)[name]
    if len(shape) < 4:
        other = Model(written(tmp_path, architecture, **{name: ((1, *shape),)}))
        assert np.array_equal(other.logits([1, 2, 10]), plain)


@pytest.mark.parametrize(("architecture", "name"), NAMES)
def test_a_tensor_of_unsupported_type_is_refused_by_name(tmp_path, monkeypatch, architecture, name):
    monkeypatch.delitem(FORMATS, "I8")  # of the types that are truly unsupported, none has rows of 24
    path = written(tmp_path, architecture, **{name: (shapes(architecture)[name], "I8")})
    with pytest.raises(FormatError, match=f"^{name}: type I8 is not supported; supported: {', '.join(FORMATS)}"):
        Model(path)


@pytest.mark.parametrize("shape", [(VOCAB,), (1, VOCAB, WIDTH)])
def test_an_embedding_that_is_no_matrix_is_refused(tmp_path, shape):
    with pytest.raises(ConfigError, match=r"^token_embd\.weight: .*not a matrix"):
        Model(written(tmp_path, **{"token_embd.weight": (shape,)}))


def test_an_output_head_of_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^output\.weight: shape \[12, 24\].*\[11, 24\]"):
        Model(written(tmp_path, **{"output.weight": ((VOCAB + 1, WIDTH),)}))


@pytest.mark.parametrize(("layers", "named"), [(3, r"blk\.2\.\w+\.weight"), (10_000_000, r"qwen3moe\.block_count")])
def test_more_layers_than_the_file_has_are_refused(tmp_path, layers, named):
    with pytest.raises(ConfigError, match=f"^{named}: "):
        Model(written(tmp_path, metadata={"qwen3moe.block_count": layers}))


UNUSED = ["blk.1.attn_q.bias", "blk.0.ffn_up_shexp.weight", "rope_freqs.weight", "blk.2.attn_norm.weight"]


@pytest.mark.parametrize("name", UNUSED)
def test_a_tensor_that_would_be_ignored_is_refused(tmp_path, name):
    """llama.cpp uses such a tensor or refuses the file ("wrong number of tensors"): a model short of it is another."""
    with pytest.raises(ConfigError, match=f"^{name}: "):
        Model(written(tmp_path, **{name: ((24,),)}))


def test_a_file_that_says_it_is_a_part_is_refused_with_the_remedy(tmp_path):
    whole = written(tmp_path, metadata={"split.count": np.uint16(1)})
    assert Model(whole).logits([0]).shape == (1, VOCAB)
    part = written(tmp_path, metadata={"split.count": np.uint16(3)})
    with pytest.raises(GGUFError, match=r"split\.count: .*open the first, named NAME-00001-of-00003\.gguf"):
        Model(part)
    with open_gguf(part) as file, pytest.raises(ConfigError, match=r"^split\.count: .*llama-gguf-split --merge"):
        Model(file)
