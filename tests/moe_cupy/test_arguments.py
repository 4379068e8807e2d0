"""The Python interface as people expect it: keywords to be seen, errors that name them, examples that run."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest

import moe_cupy
from moe_cupy import Engine, Options, Sampler, Stats
from moe_cupy.device import DeviceError
from moe_cupy.device.host import MOST_THREADS, HostDevice, usable_cores
from moe_cupy.engine.engine import EngineError
from moe_cupy.engine.spelling import NAMES, flags, in_python, python_names
from moe_ref.sampling import SamplingError
from tests.models import tiny_moe

ROOT = Path(__file__).resolve().parents[2]
HUGE, NAN, INF = 10**400, float("nan"), float("inf")
EXAMPLES = ("moe_cupy", "moe_cupy.engine.engine", "moe_cupy.engine.options", "moe_ref.sampling", "moe_ref.model")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, threads=1) as engine:
        yield engine


def test_the_keywords_of_an_engine_are_the_fields_of_options_with_their_defaults():
    found = {p.name: p for p in inspect.signature(Engine).parameters.values() if p.kind is p.KEYWORD_ONLY}
    found.pop("_device")
    fields = {field.name: field for field in dataclasses.fields(Options)}
    assert list(found) == list(fields)
    for name, parameter in found.items():
        assert parameter.default == fields[name].default
        assert parameter.annotation == fields[name].type


def test_every_option_has_one_spelling_as_a_flag_at_least():
    fields = {field.name for field in dataclasses.fields(Options)} - {"progress"}
    assert set(NAMES.values()) == fields


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_examples_in_docstrings_run(module, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = doctest.testmod(importlib.import_module(module), extraglobs={"Sampler": Sampler, "Engine": Engine})
    assert found.attempted and not found.failed


def test_the_readmes_example_runs(model, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)[1]
    exec(code.replace("model.gguf", "data/moe-40m-Q4_K_M.gguf"), {})
    assert "decode            64 tokens, " in capsys.readouterr().out


def test_what_is_exported_is_there_and_seen():
    assert {"Engine", "Options", "Sampler", "Stats"} <= set(moe_cupy.__all__) <= set(dir(moe_cupy))
    assert all(getattr(moe_cupy, name) is not None for name in moe_cupy.__all__)


def test_stats_print_as_a_table():
    lines = str(Stats("host", "echo", "none", 8, 1 << 20, 32, prompt_tokens=1, generated_tokens=2)).splitlines()
    assert lines[0] == "experts resident  8 of 32 (25%)"
    assert "prompt            1 token, 0.0 tok/s" in lines and "decode            2 tokens" in lines


WRONG_OPTIONS = [
    *(("threads", value) for value in (0, -5, 2.5, NAN, INF, HUGE, True, "4", b"4")),
    *(("ctx_size", value) for value in (-1, 2.0, NAN, HUGE, True, None, "")),
    *(("ubatch_size", value) for value in (0, -5, 1.5, NAN, HUGE, None)),
    *(("reads_in_flight", value) for value in (0, 257, HUGE, "4")),
    *((name, value) for name in ("cache", "host_cache") for value in ("many", "", "nan", "101%", 0.25, None, b"25%")),
    *((name, value) for name in ("policy", "prefetch", "act", "decode", "device") for value in ("x", "", 5, None)),
    *((name, value) for name in ("cache_type_k", "cache_type_v") for value in ("q9", 5, None)),
    *(("n_gpu_layers", value) for value in ("some", 1.5, True, NAN, b"3")),
    *(("direct_io", value) for value in (1, None, "no")),
    ("progress", 1), ("store", 5), ("store", ""), ("overrides", 5), ("overrides", ["exps=CPU"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS, ids=lambda value: str(value)[:12])
def test_a_wrong_option_is_a_value_error_that_calls_it_as_python_does(model, name, value):
    with pytest.raises(ValueError) as caught:
        Engine(model, **{name: value})
    message = str(caught.value)
    assert re.match(rf"{name}\b", message) and "--" not in message and "\n" not in message and len(message) < 300


def test_whole_numbers_of_any_type_are_taken(model):
    with Engine(model, threads=np.int64(1), ctx_size=np.uint8(64), ubatch_size=np.int32(3)) as engine:
        assert (engine.options.ctx_size, type(engine.options.ctx_size)) == (64, int)
        assert len(list(engine.generate_tokens(np.array([1, 2]), np.int64(3)))) == 3


def test_an_unknown_keyword_and_a_model_that_is_no_path_are_named(model):
    with pytest.raises(TypeError, match="polcy"):
        Engine(model, polcy="lru")
    for wrong in (5, None, b"x.gguf"):
        with pytest.raises(ValueError, match=r"^model: "):
            Engine(wrong)


WRONG_CALLS = [
    *(("max_tokens", {"max_tokens": value}) for value in (2.5, -5, NAN, INF, True, "5", None)),
    *(("prompt", {"prompt": value}) for value in (b"abc", bytearray(b"a"), 5, None, [1.5], ["a"], [HUGE], [[1]], [-1])),
    *(("stop", {"stop": value}) for value in (5, "abc", b"a")),
    *(("sampler", {"sampler": value}) for value in (0.8, "greedy")),
]


@pytest.mark.parametrize(("name", "given"), WRONG_CALLS, ids=lambda value: str(value)[:30])
def test_a_wrong_argument_of_generate_is_named_at_the_call(engine, name, given):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        engine.generate_tokens(**({"prompt": [1, 2]} | given))


@pytest.mark.parametrize("token", [2.5, None, True, -1, 10**30, [1]])
def test_a_wrong_token_is_named(engine, token):
    with pytest.raises(ValueError, match=r"^token "):
        engine.decode(token)


@pytest.mark.parametrize(
    ("name", "value"), [("temp", HUGE), ("temp", True), ("top_k", 2.5), ("top_p", NAN), ("min_p", -1), ("seed", -2)]
)
def test_a_wrong_argument_of_a_sampler_is_named(name, value):
    with pytest.raises(SamplingError, match=f"^{name} is "):
        Sampler(**{name: value})


@pytest.mark.parametrize(
    ("message", "python"),
    [
        ("--cache 'many': expected", "cache='many': expected"),
        ("--cache of 3 bytes is too small", "cache of 3 bytes is too small"),
        ("-ctk f16 -ctv q8_0: no", "cache_type_k='f16' cache_type_v='q8_0': no"),
        ("use at most -c 55", "use at most ctx_size=55"),
        (
            "--policy x: not with --decode device, or --decode host",
            "policy='x': not with decode='device', or decode='host'",
        ),
        ("--cached x-c 3", "--cached x-c 3"),
    ],
)
def test_flags_become_keywords(message, python):
    assert in_python(message) == python
    for spelled, words in ((python_names(), python), (flags(), message)):
        with pytest.raises(ValueError) as caught, spelled, python_names():
            raise ValueError(message)
        assert str(caught.value) == words


def test_more_threads_than_help_are_bounded_and_said(model):
    with Engine(model, device="host", threads=100_000) as engine:
        most = MOST_THREADS * usable_cores()
        assert engine.device.threads == most
        assert f"{most} threads instead of 100000: {MOST_THREADS} a core are the most" in engine.device_reason
        assert engine.logits([1]).shape[0] == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_and_may_open_its_own(model):
    with Engine(model, threads=2) as engine:
        want, device = engine.logits([1, 2]), HostDevice(2)
        stream, queue = device.stream("x"), device.workers("q", 1)
        begun = engine.generate_tokens([1], 9)
        next(begun)
        child = os.fork()
        if child == 0:  # what pytest would do here is nobody's business
            os._exit(_in_child(engine, device, (stream, queue, begun), want, model))
        assert os.waitpid(child, 0)[1] == 0, "see _in_child for the number"
        device.close()
        assert np.array_equal(engine.logits([1, 2]), want), "the parent goes on"


def _in_child(engine, device, parts, want, model) -> int:
    """0, or the number of the first call that did not say what is wrong; a hang ends by an alarm."""
    import signal

    signal.alarm(60)
    stream, queue, begun = parts
    calls = [
        (EngineError, lambda: engine.logits([1])), (EngineError, lambda: next(begun)), (EngineError, engine.reset),
        (EngineError, lambda: engine.decode(1)), (DeviceError, device.synchronize), (DeviceError, device.recover),
        (DeviceError, lambda: stream.run(print)), (DeviceError, lambda: queue.submit(print, 0)),
        (DeviceError, lambda: device.split(lambda *rows: None, 9, 1 << 21)), (DeviceError, device.split.crew.wake),
    ]  # fmt: skip
    for number, (kind, call) in enumerate(calls, 1):
        try:
            call()
            return number
        except kind as error:
            if "fork" not in str(error):
                return number
    engine.close()
    device.close()
    with Engine(model, threads=2) as own:
        return 0 if np.array_equal(own.logits([1, 2]), want) else 99
