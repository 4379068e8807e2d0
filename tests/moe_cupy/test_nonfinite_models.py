"""A NaN or an infinity anywhere in a model is an error that names it, in both engines, whatever is rounded."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from moe_cupy.cli import main as cupy_main
from moe_cupy.device.base import DeviceError
from moe_cupy.engine import Engine
from moe_cupy.store import StoreError
from moe_ref.__main__ import main as ref_main
from moe_ref.finite import NonFiniteError
from moe_ref.gguf import open_gguf
from moe_ref.model import Model
from moe_ref.perplexity import perplexity
from tests.models import Shape, tiny_moe
from tests.poison import poisoned, tensors_to_poison

ROOT = Path(__file__).resolve().parents[2]
ARCHS = sorted((ROOT / "tests/data/archs").glob("*.gguf"))
PROMPT = np.array([5, 17, 33, 60, 2, 40, 77, 21])
MIXES = [("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "Q8_0", "Q8_0"), ("Q4_0", "Q4_1", "Q5_1"), ("IQ4_NL", "IQ4_XS", "Q5_K"),
         ("Q2_K", "Q3_K", "F16"), ("BF16", "IQ2_S", "IQ3_XXS")]  # fmt: skip


def refusal(path: Path, tokens: np.ndarray, **options: str) -> str:
    """What the runtime says of a poisoned model; fails if it goes on."""
    with pytest.raises(NonFiniteError) as error, Engine(path, **options) as engine:
        list(engine.generate_tokens(tokens, max_tokens=3))
    return str(error.value)


def stem(name: str) -> str:
    """What of a tensor's name every error about it holds: fused matrices have names of their own."""
    fused = {"attn_qkv": "attn_", "ffn_gate_up_exps": "_exps", "attn_kv_b": "attn_kv_b"}
    return next((kept for whole, kept in fused.items() if whole in name), name)


def models(folder: Path) -> list[Path]:
    """The small architectures, and models whose experts and dense matrices are of many types."""
    made = []
    for i, mix in enumerate(MIXES):
        shape = Shape(layers=2, width=256, inner=256, head=64, dense_type=mix[0], expert_types=(mix,), tied=bool(i % 2))
        made.append(tiny_moe(folder / f"{i}.gguf", shape, seed=i))
    return [*ARCHS, *made]


def instances(folder: Path, per_model: int, seed: int):
    """(path, what was written, tensor's name) of poisoned copies, each of another place."""
    rng = np.random.default_rng(seed)
    for source in models(folder):
        with open_gguf(source) as file:
            found = tensors_to_poison(file)
        for i in rng.permutation(len(found))[:per_model]:
            target = folder / "poisoned.gguf"
            yield target, f"{source.name}: {poisoned(source, target, found[i], rng)}", found[i].name


@pytest.mark.parametrize("act", ["f32", "q8"])
@pytest.mark.parametrize("per_model", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_the_host_names_what_is_not_finite_wherever_it_stands(tmp_path, act, per_model):
    for path, what, name in instances(tmp_path, per_model, seed=per_model + (act == "q8")):
        assert stem(name) in refusal(path, PROMPT, device="host", act=act, cache="100%"), what


def test_the_reference_names_it_too_without_warnings(tmp_path, recwarn):
    acts = itertools.cycle(["f32", "q8"])
    for path, what, name in instances(tmp_path, per_model=4, seed=3):
        with pytest.raises(NonFiniteError) as error:
            Model(path, act=next(acts)).logits(PROMPT)
        assert stem(name) in str(error.value), what
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize(("act", "decode"), [("f32", "host"), ("q8", "host"), ("f32", "device")])
@pytest.mark.parametrize("per_model", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_a_device_with_memory_of_its_own_names_it_too(tmp_path, act, decode, per_model):
    for path, what, name in instances(tmp_path, per_model, seed=4):
        try:
            said = refusal(path, PROMPT, device="emulated", act=act, decode=decode, policy="lru", cache="100%")
        except DeviceError as error:
            pytest.skip(str(error))
        assert stem(name) in said, what


def changed(path: Path, name: str, numbers: dict[int, float]) -> None:
    """Write float32 numbers into a tensor of a file, by index."""
    with open_gguf(path) as file:
        info = file.tensors[name]
    assert info.type == "F32"
    with open(path, "r+b") as target:
        for index, number in numbers.items():
            target.seek(info.offset + 4 * index)
            target.write(np.float32(number).tobytes())


@pytest.mark.parametrize("device", ["host", "emulated"])
def test_keys_that_half_precision_cannot_hold_are_refused_and_float32_holds_them(tmp_path, device):
    path = tiny_moe(tmp_path / "m.gguf", Shape(), seed=3)
    changed(path, "blk.1.attn_k_norm.weight", {3: 1e6})
    try:
        said = refusal(path, PROMPT, device=device, cache_type_k="f16", cache_type_v="f16")
    except DeviceError as error:
        pytest.skip(str(error))
    assert "layer 1" in said and "-ctk f32" in said
    with pytest.raises(NonFiniteError, match=r"keys of layer 1 as F16.*-ctk f32"):
        Model(path, cache_type_k="f16", cache_type_v="f16").logits(PROMPT)
    with Engine(path, device=device) as engine:
        assert np.isfinite(engine.logits(PROMPT)).all()


@pytest.mark.parametrize("act", ["f32", "q8"])
def test_finite_weights_that_overflow_are_told_from_damaged_ones(tmp_path, act):
    path = tiny_moe(tmp_path / "m.gguf", Shape(), seed=3)
    changed(path, "blk.1.ffn_norm.weight", dict.fromkeys(range(64), 1e30))
    changed(path, "blk.1.ffn_gate_inp.weight", dict.fromkeys(range(64), 1e30))
    said = refusal(path, PROMPT, device="host", act=act)
    assert said.startswith("layer 1: the product with blk.1.ffn_gate_inp.weight is not finite")
    with pytest.raises(NonFiniteError, match=r"the product with blk\.1\.ffn_gate_inp"):
        Model(path).logits(PROMPT)


def test_commands_say_it_in_one_line_with_exit_code_1(tmp_path, capsys):
    path, text = ROOT / "data" / "moe-40m-Q4_K_M.gguf", tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged, that a single man " * 20)
    with open_gguf(path) as file:
        poisoned(path, tmp_path / "m.gguf", file.tensors["blk.2.ffn_down_exps.weight"], np.random.default_rng(0))
    model = str(tmp_path / "m.gguf")
    for main, command in (
        (cupy_main, ["run", "-m", model, "-p", "It is", "-n", "3"]),
        (cupy_main, ["perplexity", "-m", model, "-f", str(text), "-c", "32", "--chunks", "2", "--act", "q8"]),
        (cupy_main, ["logits", "-m", model, "--tokens", "1,2", "-o", str(tmp_path / "out.npz")]),
        (cupy_main, ["bench", "-m", model, "-p", "4", "-n", "1", "-r", "1"]),
        (ref_main, ["generate", model, "-p", "It is", "-n", "3"]),
        (ref_main, ["perplexity", model, "-f", str(text), "-c", "32", "--chunks", "2", "--act", "q8"]),
    ):
        assert main(command) == 1, command
        error = capsys.readouterr().err.splitlines()[-1]
        assert "error: blk.2.ffn_down_exps.weight[" in error, (command, error)
    assert not (tmp_path / "out.npz").exists()


def test_an_engine_is_usable_after_a_prompt_that_met_a_bad_number(tmp_path):
    path = tiny_moe(tmp_path / "m.gguf", Shape(), seed=3)
    with Engine(path, device="host") as engine:
        want = engine.logits(PROMPT)
    changed(path, "token_embd.weight", {64 * 90: np.nan})
    with Engine(path, device="host", cache="slots:2") as engine:
        for _ in range(2):
            with pytest.raises(NonFiniteError, match="token_embd"):
                engine.logits([5, 90, 7])
            assert np.array_equal(engine.logits(PROMPT), want)


def test_a_model_that_another_is_written_over_ends_the_run(tmp_path):
    path = tiny_moe(tmp_path / "m.gguf", Shape(), seed=3)
    other = tiny_moe(tmp_path / "other.gguf", Shape(), seed=4)
    with Engine(path, device="host", cache="slots:2") as engine:
        engine.prefill(PROMPT)
        path.write_bytes(other.read_bytes())
        with pytest.raises(StoreError, match="written over it since it was opened"):
            for token in range(20):
                engine.decode(token)


def test_a_perplexity_that_is_no_number_is_an_error():
    with pytest.raises(NonFiniteError, match="perplexity inf"):
        perplexity(lambda ids: np.where(np.arange(9) == ids[:, None], 4e38, 0.0), [np.array([1, 2, 3])])
