"""``doctor --write``: what is concluded from the runs' seconds, whatever other work did to them."""

from __future__ import annotations

import pytest

from moe_cupy import profile_command
from moe_cupy.__main__ import main
from moe_cupy.plan import PlanError
from moe_cupy.plan.shapes import from_file
from moe_cupy.profile_command import USED, Run, made_up, undisturbed
from moe_ref.split import open_model

LAYER_S, STOP_S, PER_BYTE, READ_S = 100e-6, 60e-6, 1e-10, 5e-3  # of the machine that is made up


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    paths = folder / "tiny.gguf", folder / "large.gguf"
    made_up(paths[0], 2, 256, 256)
    made_up(paths[1], 2, 512, 512)
    return paths


def machine(monkeypatch, slowed: float = 1.0, waits: bool = True) -> None:
    """A machine that computes as said above; resident runs of the large model take ``slowed`` times as long."""
    monkeypatch.setattr(profile_command, "row_rates", lambda threads, act: {})

    def decode(path, cache, threads, act, watched):
        with open_model(path) as file:
            model = from_file(file)
        run = Run(model, 0.0, 0.0)
        seconds = model.layers * LAYER_S + run.read * PER_BYTE
        if cache == "100%":
            return Run(model, seconds * (slowed if "large" in str(path) else 1) + watched * model.layers * STOP_S, 0.0)
        wait = USED * READ_S - (USED - 1) * model.expert_bytes * PER_BYTE  # all experts of a layer are missing
        return Run(model, seconds + model.layers * (STOP_S + wait * waits), float(model.layers * USED))

    monkeypatch.setattr(profile_command, "decode", decode)


def test_a_profile_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profile_command, "measure", lambda folder: pytest.fail("measured"))
    assert main(["doctor", "--write", str(tmp_path / "none" / "p.toml")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_rates_are_found_again(files, monkeypatch):
    machine(monkeypatch)
    found = undisturbed(*files, 1, "q8")
    with open_model(files[1]) as file:
        expert = from_file(file).expert_bytes
    assert found["layer_us"] == pytest.approx(1e6 * LAYER_S)
    assert found["stop_us"] == pytest.approx(1e6 * STOP_S)
    assert found["weights_gbps"] == pytest.approx(1e-9 / PER_BYTE)
    assert found["experts_from_disk_gbps"] == pytest.approx(1e-9 * expert / READ_S)


@pytest.mark.parametrize("slowed", [1.0, 1.5])
def test_a_disk_that_is_never_waited_for_is_no_faster_than_what_hides_it(files, monkeypatch, slowed):
    """Also where other work slowed the resident run, so that less than nothing was waited."""
    machine(monkeypatch, slowed, waits=False)
    found = undisturbed(*files, 1, "f32")
    assert found["experts_from_disk_gbps"] == pytest.approx(found["weights_gbps"] * USED / (USED - 1))


def test_runs_that_contradict_each_other_are_told(files, monkeypatch):
    machine(monkeypatch, slowed=0.2)
    with pytest.raises(PlanError, match="cannot be: other work disturbs"):
        undisturbed(*files, 2, "q8")
