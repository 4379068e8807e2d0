"""Route traces: sound ones are read, hostile ones are refused in one line, other tools' files become ours."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from moe_cupy.cli import main
from moe_cupy.lab import info
from moe_cupy.lab.importers import import_trace
from moe_cupy.lab.trace import RouteTrace, TraceError, read_trace, write_trace
from moe_ref.model import Model
from tests.conftest import SHARED
from tests.models import Shape, tiny_moe

ROUTES = SHARED / "data" / "routes"
needs_routes = pytest.mark.skipif(not ROUTES.is_dir(), reason=f"{ROUTES} is absent")


def example(tokens: int = 12, layers: int = 3, experts: int = 8, k: int = 2, seed: int = 0) -> RouteTrace:
    """Random distinct ids in two sequences."""
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, experts)).argsort(axis=2)[..., :k]
    return RouteTrace(ids, experts, np.array([0, tokens // 2]), {"model": "made up"})


def written(trace: RouteTrace) -> bytes:
    out = io.BytesIO()
    write_trace(out, trace)
    return out.getvalue()


def test_a_trace_is_read_as_it_was_written(tmp_path):
    trace = example()
    trace = RouteTrace(trace.experts, 8, trace.starts, trace.meta, weights=np.float32(trace.experts) / 8)
    (tmp_path / "t.npz").write_bytes(written(trace))
    back = read_trace(tmp_path / "t.npz")
    assert np.array_equal(back.experts, trace.experts) and back.n_experts == 8
    assert np.array_equal(back.weights, trace.weights) and back.router is None
    assert back.starts.tolist() == [0, 6] and back.meta["model"] == "made up"
    assert back.key_rows()[3][2] == [16 + int(e) for e in trace.experts[3, 2]]
    assert [list(s) for s in back.sequences()] == [[0, 6], [6, 12]]
    assert back.part(4, 9).starts.tolist() == [0, 2]


@needs_routes
def test_every_published_trace_is_read_and_its_overlap_is_the_published_one():
    files = sorted(ROUTES.glob("*/*.npz"))
    assert len(files) >= 7
    for path in files:
        assert read_trace(path).shape[0] > 0
    published = info.describe(read_trace(ROUTES / "ship" / "qwen3-30b-a3b_decode_1.npz"))
    assert published["overlap_with_previous_token"] == pytest.approx(0.380, abs=5e-4)  # BASELINE.md
    assert published["touched"] == pytest.approx(0.50, abs=5e-3)
    mixtral = info.describe(read_trace(ROUTES / "nolicence" / "mixtral-8x7b_decode_1.npz"))
    assert (mixtral["overlap_of_uniform_choices"], mixtral["touched"]) == (0.25, 1.0)


def archive(**arrays: object) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


META = np.array(json.dumps({"n_experts": 4}))
IDS = np.array([[[0, 1]], [[2, 3]]], np.uint8)
START = np.array([0])


def bomb() -> bytes:
    """A header that promises 2^40 ids."""
    out = io.BytesIO(archive(starts=START, meta=META))
    with zipfile.ZipFile(out, "a") as z:
        head = io.BytesIO()
        promised = {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 10, 1 << 10)}
        np.lib.format.write_array_header_1_0(head, promised)
        z.writestr("experts.npy", head.getvalue())
    return out.getvalue()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not a readable .npz"),
        (b"PK\x03\x04 nonsense", "not a readable .npz"),
        (archive(a=IDS), "no array experts, meta, starts"),
        (archive(experts=IDS, starts=START, meta=np.array("{")), "meta: not JSON"),
        (archive(experts=IDS, starts=START, meta=np.array("[1]")), "expected a JSON object, found list"),
        (archive(experts=IDS, starts=START, meta=np.array('{"n_experts": "4"}')), "meta.n_experts"),
        (archive(experts=IDS, starts=START, meta=np.array('{"n_experts": 3}')), r"ids 0\.\.3, but n_experts is 3"),
        (archive(experts=IDS[0], starts=START, meta=META), r"expected ids \[T, L, k\]"),
        (archive(experts=IDS * 1.0, starts=START, meta=META), "found float64"),
        (archive(experts=np.zeros((2, 1, 2), int), starts=START, meta=META), "token 0, layer 0 names an expert twice"),
        (archive(experts=IDS, starts=np.array([1]), meta=META), "starts"),
        (archive(experts=IDS, starts=np.array([0, 2]), meta=META), "starts"),
        (archive(experts=IDS, starts=np.array([0, 0]), meta=META), "starts"),
        (archive(experts=IDS, starts=START, meta=META, weights=np.ones((2, 1, 3))), r"weights: expected numbers"),
        (archive(experts=IDS, starts=START, meta=META, weights=np.full((2, 1, 2), np.nan)), "not finite"),
        (archive(experts=IDS, starts=START, meta=META, ahead=IDS + 4), "ahead: ids outside"),
        (archive(experts=np.array([[["a"]]], object), starts=START, meta=META), "cannot be read"),
        (bomb(), "more than a trace may hold"),
        (archive(experts=IDS, starts=START, meta=META)[:300], "not a readable .npz"),
    ],
)
def test_hostile_files_are_refused_in_one_line(tmp_path, capsys, raw, words):
    path = tmp_path / "t.npz"
    path.write_bytes(raw)
    with pytest.raises(TraceError, match=words) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert main(["routes", "info", str(path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_random_damage_to_a_trace_never_escapes_as_another_exception(tmp_path):
    raw, rng = written(example()), np.random.default_rng(1)
    for _ in range(300):
        broken = bytearray(raw)
        for at in rng.integers(0, len(raw), 4):
            broken[at] = rng.integers(256)
        (tmp_path / "t.npz").write_bytes(bytes(broken))
        with contextlib.suppress(TraceError):
            read_trace(tmp_path / "t.npz")


CSV = "seq,token,layer,experts,weights\n0,0,1,3 1,0.6 0.4\n0,0,0,2 0,0.7 0.3\n0,1,0,1|2,0.5 0.5\n0,1,1,0|3,0.9 0.1\n"
CSV_COLUMNS = "token_idx,layer_idx,e0,e1\n0,0,2,0\n0,1,3,1\n1,0,1,2\n1,1,0,3\n"
CSV_LONG = "step,layer,expert\n0,0,2\n0,0,0\n0,1,3\n0,1,1\n1,0,1\n1,0,2\n1,1,0\n1,1,3\n"
JSONL = "".join(
    json.dumps({"pos": t, "layer": layer, "topk_ids": ids}) + "\n"
    for (t, layer), ids in {(0, 0): [2, 0], (0, 1): [3, 1], (1, 0): [1, 2], (1, 1): [0, 3]}.items()
)
LLAMA = """\
ggml_debug:            ffn_moe_topk-0 = (i32)       VIEW(ffn_moe_argsort-0{8, 2, 1, 1}, }) = {2, 2, 1, 1}
                                     [
                                      [
                                       [           2,            0],
                                       [           1,            2],
                                      ],
                                     ]
                                     sum = 5.000000
ggml_debug:            ffn_moe_topk-1 = (i32)       VIEW(ffn_moe_argsort-1{8, 2, 1, 1}, }) = {2, 2, 1, 1}
                                     [
                                      [
                                       [           3,            1],
                                       [           0,            3],
                                      ],
                                     ]
                                     sum = 7.000000
"""
WANT = [[[2, 0], [3, 1]], [[1, 2], [0, 3]]]


@pytest.mark.parametrize(
    ("text", "kind"),
    [(CSV, "csv"), (CSV_COLUMNS, "csv"), (CSV_LONG, "csv"), (JSONL, "jsonl"), (LLAMA, "llama.cpp")],
    ids=["csv", "csv-columns", "csv-long", "jsonl", "llama.cpp"],
)
def test_other_tools_files_become_the_same_trace(tmp_path, text, kind):
    trace = import_trace(text, kind)
    assert trace.experts.tolist() == WANT and trace.n_experts == 4 and trace.meta["layer_ids"] == [0, 1]
    (tmp_path / "routes.txt").write_text(text)
    out = str(tmp_path / "t.npz")
    assert main(["routes", "import", str(tmp_path / "routes.txt"), "-o", out, "--experts", "8"]) == 0
    assert read_trace(out).experts.tolist() == WANT and read_trace(out).n_experts == 8


def test_imported_weights_follow_their_experts_and_two_passes_of_a_dump_follow_each_other():
    want = np.float32([[[0.7, 0.3], [0.6, 0.4]], [[0.5, 0.5], [0.9, 0.1]]])
    assert np.array_equal(import_trace(CSV, "csv").weights, want)
    assert import_trace(LLAMA + LLAMA, "llama.cpp").experts.tolist() == WANT + WANT


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("token,layer,experts\n0,0,1 2\n0,1,3\n", "csv", "token 0, layer 1: 1 experts, others have 2"),
        ("token,layer,experts\n0,0,1 2\n1,1,1 3\n", "csv", "0 experts"),
        ("token,layer,experts\n0,x,1 2\n", "csv", "layer 'x' is not a whole number"),
        ("token,layer\n0,0\n", "csv", "line 2: no experts"),
        ("[1, 2]\n", "jsonl", "line 1: expected a JSON object"),
        ("", "csv", "no routes found"),
        (LLAMA.replace("2,            0", "2, ...,      0"), "llama.cpp", r"no routes found|shortened"),
    ],
)
def test_files_with_holes_are_refused(text, kind, words):
    with pytest.raises(TraceError, match=words):
        import_trace(text, kind)


def test_both_engines_record_the_same_routes_and_the_routers_probabilities(tmp_path):
    model = str(tiny_moe(tmp_path / "m.gguf", Shape(layers=3, experts=6, used=2), seed=2))
    traces = []
    for engine in ("cupy", "ref"):
        out = str(tmp_path / f"{engine}.npz")
        flags = ["--tokens", "5,6,7,8", "-n", "9", "--engine", engine, "--router", "-o", out]
        assert main(["routes", "record", "-m", model, *flags]) == 0
        traces.append(read_trace(out))
    a, b = traces
    assert a.shape == (13, 3, 2) and a.phase.tolist() == [0] * 4 + [1] * 9
    assert np.array_equal(a.experts, b.experts) and np.allclose(a.router, b.router, atol=1e-6)
    best = np.sort(np.argsort(-a.router, axis=2)[..., :2], axis=2)
    assert np.array_equal(best, np.sort(a.experts, axis=2)), "the selected are those of the highest probability"


def test_what_the_next_router_says_early_is_kept(tmp_path):
    """No block changes the residual stream of this model, so what is said early is what comes."""
    model = str(tiny_moe(tmp_path / "m.gguf", Shape(layers=4), seed=3, zero=("attn_output", "ffn_down_exps")))
    out = str(tmp_path / "t.npz")
    assert main(["routes", "record", "-m", model, "--tokens", "1,2,3", "-n", "4", "--ahead", "-o", out]) == 0
    trace = read_trace(out)
    assert np.array_equal(trace.ahead, trace.experts)
    assert not np.array_equal(trace.experts[:, 0], trace.experts[:, 1])


def test_recorded_routes_are_those_of_one_pass_over_the_same_tokens(tmp_path):
    model = tiny_moe(tmp_path / "m.gguf", Shape(), seed=4)
    out = str(tmp_path / "t.npz")
    assert main(["routes", "record", "-m", str(model), "--tokens", "9,8,7", "-o", out]) == 0
    reference, seen = Model(model), {}
    reference.observe = seen.__setitem__
    reference.logits([9, 8, 7])
    want = np.stack([seen[f"ffn_moe_topk-{layer}"] for layer in range(3)], axis=1)
    assert np.array_equal(read_trace(out).experts, want)


def test_figures_worked_out_by_hand():
    """Two experts always, of four: one layer, tokens {0,1} {0,1} {2,3} {0,1}."""
    trace = RouteTrace(np.array([[[0, 1]], [[1, 0]], [[2, 3]], [[0, 1]]]), 4, np.array([0, 3]))
    facts = info.describe(trace)
    assert facts["overlap_with_previous_token"] == 0.5  # pairs (0,1) and (1,2); (2,3) crosses sequences
    assert facts["touched"] == 1.0
    assert info.uses(trace).tolist() == [[3, 3, 1, 1]]
    assert facts["entropy_bits"] == pytest.approx(-2 * (3 / 8 * np.log2(3 / 8) + 1 / 8 * np.log2(1 / 8)))
    assert sorted(info.reuse_tokens(trace)) == [1, 1, 2, 2]
    assert info.union_growth(trace, (1, 2, 3)) == {1: 2.0, 2: 2.0, 3: 4.0}


def test_info_draws_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "t.npz"
    path.write_bytes(written(example(40)))
    assert main(["routes", "info", str(path), "--plot", str(tmp_path / "t.png"), "--json"]) == 0
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(capsys.readouterr().out)["tokens"] == 40
    assert not list(Path(tmp_path).glob(".t.png*"))
