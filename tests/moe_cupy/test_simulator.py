"""The simulator: virtual time worked out by hand, counts equal to the plain replay's, the JSON contract."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cupy.cache import POLICIES
from moe_cupy.cli import main
from moe_cupy.lab.links import Links
from moe_cupy.lab.machine import Machine, expert_bytes_of, expert_size
from moe_cupy.lab.replay import make_caches, replay
from moe_cupy.lab.simulator import Outcome, simulate
from moe_cupy.lab.trace import RouteTrace, write_trace
from moe_cupy.prefetch import PREFETCHERS, NextGate
from tests.moe_cupy.test_replay import drawn

# Seconds that are easy to add up: attention 1, an expert's compute 2, a copy 10, the head 0.
SLOW = Machine(link_bytes_s=100, link_latency_s=0, device_bytes_s=500, attention_s=1, head_s=0, disk_bytes_s=50,
               disk_latency_s=0)  # fmt: skip
SIZE = 1000


def trace_of(*tokens: list[list[int]], experts: int = 8, **more: object) -> RouteTrace:
    return RouteTrace(np.array(tokens), experts, np.array([0]), **more)


def played(trace: RouteTrace, slots: int, policy="lru", prefetch="none", machine=SLOW, early=None) -> Outcome:
    caches = make_caches(trace, POLICIES[policy], slots, "global", False)
    return simulate(trace, caches, PREFETCHERS[prefetch](), machine, SIZE, early)


def test_demand_copies_follow_one_another_and_compute_overlaps_with_them():
    """Token 1: attention 1, copies arrive at 11 and 21, computed to 13 and 23. Token 2 (one hit): attention to 24,
    the hit is computed to 26, the miss arrives at 34, is computed to 36."""
    out = played(trace_of([[0, 1]], [[0, 2]]), slots=2)
    assert (out.hits, out.misses, out.evictions) == (1, 3, 1)
    assert out.total_s == pytest.approx(36)
    assert out.stall_s == pytest.approx(10 + 8 + 8)


def test_a_right_prefetch_hides_what_compute_takes_and_is_late_for_the_rest():
    """Layer 0: copy of 0 arrives at 11, computed to 13; asked for at 1, the copy for layer 1 runs from 11 to 21.

    Layer 1: attention to 14, it is late until 21, computed to 23. Without prefetch it is asked for at 14: 24, 26."""
    trace = trace_of([[0], [3]])
    ahead = played(trace, slots=4, prefetch="next-gate", early=trace.experts)
    assert (ahead.hits, ahead.misses, ahead.late, ahead.prefetched, ahead.wasted) == (1, 1, 1, 1, 0)
    assert (ahead.total_s, ahead.stall_s) == (pytest.approx(23), pytest.approx(10 + 7))
    assert played(trace, slots=4).total_s == pytest.approx(26)
    assert (ahead.predicted, ahead.predicted_right, ahead.predictable) == (1, 1, 1)


def test_a_wrong_prefetch_that_has_begun_delays_the_demand_and_is_wasted():
    """3 is fetched for 4: from 11 to 21; 4 is asked for at 14 and copied from 21 to 31, computed to 33."""
    trace = trace_of([[0], [4]])
    out = played(trace, slots=4, prefetch="next-gate", early=np.array([[[0], [3]]]))
    assert (out.misses, out.prefetched, out.wasted, out.cancelled) == (2, 1, 1, 0)
    assert out.total_s == pytest.approx(33)


def test_a_prefetch_that_waits_is_joined_by_demand_or_cancelled_by_eviction():
    links = Links(SLOW, SIZE, None)
    assert links.demand(1, 0) == 10
    links.prefetch(2, 1)
    links.prefetch(3, 1)
    assert links.arrival(3, 5) == 20, "joined: it overtakes 2, which has not begun"
    assert links.cancel(2, 12), "2 waits until 20"
    assert links.demand(4, 20) == 30
    links.prefetch(5, 30)
    assert not links.cancel(5, 31), "it has begun at 30"
    assert links.demand(6, 31) == 50


def test_with_two_tiers_the_first_copy_is_read_from_disk():
    """Disk 20 then link 10: 0 arrives at 1 + 20 + 10. A second copy of 0 comes from host memory, unless pushed out."""
    trace = trace_of([[0]], [[1]], [[0]], experts=4)
    both = played(trace, slots=1, machine=Machine(100, 0, 500, 1, 0, 0.5, 50, 0))
    assert both.disk_reads == 2 and both.misses == 3
    assert both.total_s == pytest.approx(3 * (1 + 2) + 3 * 10 + 2 * 20)
    one = played(trace, slots=1, machine=Machine(100, 0, 500, 1, 0, 0.25, 50, 0))
    assert one.disk_reads == 3


@given(st.integers(2, 15), st.integers(1, 4), st.integers(0, 9), st.sampled_from(sorted(POLICIES)),
       st.sampled_from(sorted(PREFETCHERS)), st.integers(0, 10))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_time_changes_no_count_and_nothing_is_free(tokens, layers, seed, policy, prefetch, extra):
    trace = drawn(tokens, layers, 8, 2, seed)
    early = trace.experts if prefetch == "next-gate" else None
    fast, slow = (
        played(trace, 2 + extra, policy, prefetch, machine, early) for machine in (Machine(link_bytes_s=1e15), SLOW)
    )
    assert (fast.hits, fast.misses, fast.prefetched) == (slow.hits, slow.misses, slow.prefetched)
    assert fast.hits + fast.misses == trace.experts.size
    for out in (fast, slow):
        assert 0 <= out.late <= out.hits and out.cancelled <= out.wasted <= out.prefetched
    compute = tokens * layers * (1 + 2 * 2)
    assert slow.total_s == pytest.approx(compute + slow.stall_s)
    if prefetch == "none":
        want = replay(trace, POLICIES[policy], 2 + extra)
        assert (slow.hits, slow.misses, slow.evictions) == (want.hits, want.misses, want.evictions)
        assert slow.collisions == want.collisions


def test_the_oracle_is_always_right_and_never_wastes_with_room():
    trace = drawn(30, 4, 8, 2, 1)
    out = played(trace, 12, prefetch="next-gate", early=trace.experts)
    assert out.predicted == out.predicted_right == out.predictable == 30 * 3 * 2
    assert out.wasted == 0
    with pytest.raises(ValueError, match="routes record --ahead"):
        simulate(trace, make_caches(trace, POLICIES["lru"], 12, "global", False), NextGate(), SLOW, SIZE)


def test_expert_bytes_follow_from_the_models_name():
    assert expert_bytes_of({"model": "openai/gpt-oss-20b"}) == 3 * 2880 * 2880 * 17 // 32 == 13219200
    assert expert_bytes_of({"expert_bytes": 5, "model": "gpt-oss-20b"}) == 5
    assert Machine().fetched_meanwhile(13219200, 4) == 1


@pytest.mark.parametrize(
    ("meta", "n_experts", "nbytes", "words"),
    [
        ({"model": "openai/gpt-oss-120b"}, 128, 3 * 2880 * 2880 * 17 // 32, "gpt-oss-120b MXFP4"),
        ({"model": "gpt-oss-120b"}, 64, 4 << 20, "gpt-oss-120b has 128 experts a layer, the trace 64"),
        ({"model": "Qwen/Qwen3-235B-A22B (Q8_0 GGUF)"}, 128, 3 * 4096 * 1536 * 34 // 32, "qwen3-235b-a22b Q8_0"),
        ({"model": "my-own.gguf"}, 8, 4 << 20, "'my-own.gguf', is not known"),
        ({"model": "mixtral-8x7bis"}, 8, 4 << 20, "is not known"),
        ({}, 8, 4 << 20, "is not known"),
    ],
)
def test_bytes_come_from_the_planners_shapes_or_are_said_to_be_assumed(meta, n_experts, nbytes, words):
    size = expert_size(meta, n_experts)
    assert size.nbytes == nbytes and words in size.source
    assert size.is_known == (nbytes != 4 << 20)


def test_replay_says_which_size_it_takes(tmp_path, capsys):
    for name, meta, words in (
        ("a", {"model": "gpt-oss-120b"}, "a.npz: 12.61 MiB an expert"),
        ("b", {}, "warning: b.npz: 4.00 MiB an expert"),
    ):
        path, trace = tmp_path / f"{name}.npz", drawn(5, 2, 128, 4, 0)
        with path.open("wb") as out:
            write_trace(out, replace(trace, meta=meta))
        command = ["replay", "--routes", str(path), "--policy", "lru", "--capacity", "0.5"]
        assert main(command) == 0
        assert words in capsys.readouterr().err
        assert main([*command, "--expert-bytes", "1000"]) == 0
        assert "an expert" not in capsys.readouterr().err


@pytest.fixture
def routes(tmp_path) -> str:
    out = io.BytesIO()
    write_trace(out, drawn(60, 4, 16, 2, 0))
    (tmp_path / "made.npz").write_bytes(out.getvalue())
    return str(tmp_path / "made.npz")


CONTRACT = (
    "routes policy prefetch capacity slots hit_rate demand_bytes prefetch_bytes wasted_bytes late stall_ms_per_token"
)


def test_replay_prints_the_contract_and_always_belady(routes, capsys):
    flags = ["--policy", "lru,echo", "--prefetch", "none,transition", "--capacity", "0.1,25%", "--expert-bytes", "1000"]
    assert main(["replay", "--routes", routes, *flags, "--json", "--jobs", "1"]) == 0
    rows = json.loads(capsys.readouterr().out.rstrip().rsplit("\n", 1)[-1])["results"]
    assert all(set(CONTRACT.split()) <= set(row) for row in rows)
    assert {(r["policy"], r["prefetch"]) for r in rows} == {
        ("lru", "none"), ("lru", "transition"), ("echo", "none"), ("echo", "transition"), ("belady", "none"),
        ("belady-admit", "none")}  # fmt: skip
    assert [r["slots"] for r in rows if r["policy"] == "belady"] == [6, 16]
    for row in rows:
        assert row["demand_bytes"] == 1000 * row["misses"] and row["hit_rate"] == row["hits"] / 480
    assert main(["replay", "--routes", routes, *flags, "--jobs", "2"]) == 0
    assert "stall ms/token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--policy", "best"], "--policy best: unknown"),
        (["--prefetch", "magic"], "--prefetch magic: unknown"),
        (["--prefetch", "next-gate"], "routes record --ahead"),
        (["--capacity", "0"], "--capacity 0"),
        (["--capacity", "0.01"], "an event needs 2"),
        (["--report", "x.pdf"], "ends in .html or .md"),
        (["--routes", "absent.npz"], "No such file"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(routes, capsys, flags, words):
    given_routes = [] if "--routes" in flags else ["--routes", routes]
    assert main(["replay", *given_routes, *flags]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_a_report_is_written_with_its_pictures(routes, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"report{suffix}"
    flags = ["--policy", "lru,echo", "--capacity", "0.1,0.5", "--report", str(out), "--jobs", "1"]
    assert main(["replay", "--routes", routes, *flags]) == 0
    page = out.read_text("utf-8")
    assert "belady" in page and "echo" in page and "12.5%" not in page
    assert "data:image/png;base64," in page if suffix == ".html" else (tmp_path / "report.0.png").exists()
