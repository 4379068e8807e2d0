"""What an engine answers when it is used wrongly: after it was closed, for two things at a time, with odd arguments."""

from __future__ import annotations

import threading

import pytest
from models import tiny_moe

from moe_cupy import Engine
from moe_cupy.engine.engine import EngineError
from moe_cupy.engine.placement import Placement
from moe_cupy.engine.stats import Stats
from moe_cupy.tools.report import side_by_side


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("model") / "tiny.gguf")


def test_a_closed_engine_says_so_and_does_not_wait(model):
    with Engine(model, cache="50%") as engine:
        begun = engine.generate_tokens([1, 2], 9)
        next(begun)
    for use in (lambda: next(begun), lambda: engine.logits([1]), lambda: list(engine.generate_tokens([1], 2))):
        with pytest.raises(EngineError, match="closed"):
            use()
    engine.close()


def test_a_second_sequence_ends_the_first_with_an_error_and_is_right_itself(model):
    with Engine(model) as engine:
        want = list(engine.generate_tokens([5, 6, 7], 8))
        begun = engine.generate_tokens([1, 2], 9)
        next(begun)
        assert list(engine.generate_tokens([5, 6, 7], 8)) == want
        with pytest.raises(EngineError, match="one at a time"):
            next(begun)


def test_a_second_thread_is_refused_while_a_pass_runs(model):
    with Engine(model) as engine:
        entered, leave, refused = threading.Event(), threading.Event(), []
        engine.forward.observe = lambda layer, routes: (entered.set(), leave.wait(10))
        first = threading.Thread(target=engine.logits, args=([1, 2, 3],))
        first.start()
        assert entered.wait(10)
        for use in (lambda: engine.logits([4]), engine.reset, lambda: engine.decode(4)):
            with pytest.raises(EngineError, match="another thread"):
                use()
            refused.append(use)
        leave.set()
        first.join(10)
        engine.forward.observe = None
        assert len(refused) == 3 and engine.logits([4]).shape[0] == 1


@pytest.mark.parametrize("cache", [0.25, 48, None])
def test_a_cache_that_is_no_text_is_refused_with_examples(model, cache):
    with pytest.raises(ValueError, match=r"^cache: .*'25%'"):
        Engine(model, cache=cache)


@pytest.mark.parametrize("prompt", [5, None, 2.5])
def test_a_prompt_that_is_no_text_and_no_list_is_refused(model, prompt):
    with Engine(model) as engine, pytest.raises(ValueError, match=r"^prompt: "):
        list(engine.generate_tokens(prompt))


def test_a_bound_on_host_memory_that_cannot_hold_is_told(model):
    """Given by hand, it must not be passed over in silence."""
    with Engine(model, host_cache="50%") as engine:
        assert "--host-cache 50% has no effect" in engine.device_reason
    with Engine(model) as engine:
        assert "--host-cache" not in engine.device_reason


def test_a_model_without_experts_reports_no_cache():
    said = "\n".join(Placement(100, 0, 0, 0, 0, "", "no routed experts").lines())
    report = side_by_side([("", Stats("host", "echo", "none", 0, 0, 0, prompt_tokens=2, prompt_seconds=0.5))])
    assert "none in this file: what is asked of their cache has no effect" in said
    assert [line.split()[0] for line in report.splitlines() if line] == ["prompt", "decode"]
