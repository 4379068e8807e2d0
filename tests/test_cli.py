"""Both command lines as a person or a script uses them: outputs, exit codes, one line for a mistake."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from moe_cupy.cli import main as cupy_main
from moe_ref.__main__ import main as ref_main
from moe_ref.gguf import open_gguf
from moe_ref.quants import dequantize
from tests import models
from tests.gguf_writer import write_gguf
from tests.models import Shape, tiny_moe

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "data" / "moe-40m-Q4_K_M.gguf")
VALID = str(ROOT / "data" / "valid.txt")


@pytest.fixture
def tiny(tmp_path) -> str:
    return str(tiny_moe(tmp_path / "tiny.gguf", Shape()))


def last_json(capsys) -> dict:
    """The last line of stdout as JSON."""
    return json.loads(capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)[-1])


def test_inspect_says_what_the_file_is(capsys):
    assert ref_main(["inspect", MODEL, "--json"]) == 0
    facts = last_json(capsys)
    assert (facts["architecture"], facts["layers"], facts["experts"], facts["experts_used"]) == ("qwen3moe", 6, 32, 4)
    with open_gguf(MODEL) as file:
        assert facts["bytes"]["total"] == sum(t.nbytes for t in file.tensors.values())
        routed = sum(t.nbytes for t in file.tensors.values() if "_exps" in t.name)
    assert facts["bytes"]["routed"] == routed == facts["bytes_per_expert"] * 6 * 32
    assert facts["unsupported"] == []
    assert ref_main(["inspect", MODEL]) == 0
    assert "can be run here" in capsys.readouterr().out


def test_inspect_works_for_files_that_cannot_be_run_and_says_why(capsys, tmp_path):
    whole = models.tensors(Shape(), seed=0)
    for metadata, tensors, words in (
        ({"general.architecture": "rwkv7"}, whole, "'rwkv7' is not supported"),
        (models.metadata(Shape()), {}, "token_embd.weight: missing"),
    ):
        write_gguf(tmp_path / "m.gguf", metadata, tensors)
        assert ref_main(["inspect", str(tmp_path / "m.gguf"), "--json"]) == 0
        assert any(words in reason for reason in last_json(capsys)["unsupported"]), words


@pytest.mark.parametrize("main", [ref_main, cupy_main], ids=["moe_ref", "moe_cupy"])
def test_logits_writes_tokens_and_logits(main, tiny, tmp_path):
    out = tmp_path / "out.npz"
    model = [tiny] if main is ref_main else ["-m", tiny]
    assert main(["logits", *model, "--tokens", "1,2,3", "-o", str(out)]) == 0
    arrays = np.load(out)
    assert arrays["tokens"].dtype == np.int32
    assert arrays["tokens"].tolist() == [1, 2, 3]
    assert (arrays["logits"].dtype, arrays["logits"].shape) == (np.float32, (3, 96))


def test_dequantize_writes_the_tensor(tmp_path):
    out = tmp_path / "t.npy"
    assert ref_main(["dequantize", MODEL, "blk.1.attn_q.weight", "-o", str(out)]) == 0
    with open_gguf(MODEL) as file:
        info = file.tensors["blk.1.attn_q.weight"]
        want = dequantize(file.read(info.name), info.type, info.shape)
    got = np.load(out)
    assert got.dtype == np.float32
    assert np.array_equal(got, want)


def test_generate_and_run_write_the_same_greedy_text(capsys):
    assert ref_main(["generate", MODEL, "-p", "The king", "-n", "12", "--json"]) == 0
    reference = last_json(capsys)
    for cache in ("25%", "slots:8", "1MiB"):
        flags = ["-p", "The king", "-n", "12", "--cache", cache, "--prefetch", "next-gate", "--json"]
        assert cupy_main(["run", "-m", MODEL, *flags]) == 0
        got = last_json(capsys)
        assert (got["tokens"], got["text"]) == (reference["tokens"], reference["text"])
    assert len(got["tokens"]) == 12
    contract = "cache_slots cache_bytes hits misses late evictions bytes_demand bytes_prefetch bytes_wasted stall_us"
    assert set(contract.split()) | {"policy", "prefetch", "device", "avg_ts", "model_filename"} <= set(got)


def test_text_alone_is_on_stdout_and_the_report_on_stderr(capsys):
    assert cupy_main(["run", "-m", MODEL, "-p", "The king", "-n", "5", "--cache", "25%"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("The king") and said.out.count("\n") == 1
    for word in ("experts resident", "hit rate", "read per token", "stall per token", "tok/s"):
        assert word in said.err and word not in said.out


def test_tokenize_counts_the_held_out_text(capsys):
    assert ref_main(["tokenize", MODEL, "-f", VALID, "--no-special", "--no-parse-special", "--json"]) == 0
    assert len(last_json(capsys)["tokens"]) == 31497  # as the model's own README states


def test_perplexity_of_both_engines_is_the_same_on_the_first_chunks(capsys):
    results = []
    for main, model in ((ref_main, [MODEL]), (cupy_main, ["-m", MODEL])):
        assert main(["perplexity", *model, "-f", VALID, "-c", "256", "--chunks", "6", "--json"]) == 0
        results.append(last_json(capsys))
    assert results[0]["tokens"] == results[1]["tokens"] == 6 * 255
    assert results[0]["nll"] == pytest.approx(results[1]["nll"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("main", [ref_main, cupy_main], ids=["moe_ref", "moe_cupy"])
def test_perplexity_of_the_whole_held_out_text_is_the_published_one(main, capsys):
    model = [MODEL] if main is ref_main else ["-m", MODEL, "--cache", "25%"]
    assert main(["perplexity", *model, "-f", VALID, "-c", "256", "--json"]) == 0
    result = last_json(capsys)
    assert result["tokens"] == 31365
    assert result["ppl"] == pytest.approx(39.955, rel=1e-3)


def test_check_passes_and_fails_with_exit_code_1_on_a_wrong_kernel(capsys, tiny, monkeypatch):
    from moe_cupy.kernels.table import OPS

    assert cupy_main(["check", "-m", tiny]) == 0
    assert "WRONG" not in capsys.readouterr().out
    real = OPS["combine"]

    def wrong(split, parts, weights, **buffers):
        real.host(split, parts=parts * np.float32(1.001), weights=weights, **buffers)

    monkeypatch.setitem(OPS, "combine", real._replace(host=wrong))
    assert cupy_main(["check", "-m", tiny]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_bench_speaks_llama_bench(capsys, tiny):
    flags = ["bench", "-m", tiny, "-p", "8", "-n", "4", "-r", "2", "--cache", "slots:4"]
    assert cupy_main([*flags, "-o", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [(r["n_prompt"], r["n_gen"]) for r in records] == [(8, 0), (0, 4)]
    for r in records:
        assert len(r["samples_ts"]) == 2
        assert r["avg_ts"] == pytest.approx(np.mean(r["samples_ts"]))
        assert {"model_size", "model_n_params", "n_threads", "stddev_ts", "hits", "misses", "stall_us"} <= set(r)
    assert cupy_main([*flags, "-o", "md", "--tokens", "1,2,3,4,5,6,7,8"]) == 0
    assert "| t/s |" in capsys.readouterr().out


# Fields of llama-bench's JSON that have a meaning here (tools/llama-bench of llama.cpp 0.5.0-dev).
LLAMA_BENCH = """build_commit build_number cpu_info gpu_info backends model_filename model_type model_size
model_n_params
n_batch n_ubatch n_threads type_k type_v n_gpu_layers n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts stddev_ts
samples_ns samples_ts""".split()
CACHE_FIELDS = """cache_slots cache_bytes hits misses late evictions bytes_demand bytes_prefetch bytes_wasted stall_us
policy prefetch device""".split()


def test_bench_takes_lists_pairs_and_depths_and_names_tests_as_llama_bench(capsys, tiny):
    flags = ["bench", "-m", tiny, "-p", "8,4", "-n", "3", "-pg", "4,2", "-d", "0,5", "-r", "1", "-t", "1,2"]
    assert cupy_main([*flags, "-o", "jsonl"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    one = [(8, 0, 0), (8, 0, 5), (4, 0, 0), (4, 0, 5), (0, 3, 0), (0, 3, 5), (4, 2, 0), (4, 2, 5)]
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in records] == one * 2
    assert [r["n_threads"] for r in records] == [1] * 8 + [2] * 8
    for r in records:
        assert {*LLAMA_BENCH, *CACHE_FIELDS} <= set(r)
        tokens = r["n_prompt"] + r["n_gen"]
        assert r["avg_ts"] == pytest.approx(1e9 * tokens / r["avg_ns"])
        assert r["prompt_tokens"] + r["generated_tokens"] == tokens, "the depth is not part of the counters"
    assert cupy_main(["bench", "-m", tiny, "-p", "4", "-n", "3", "-pg", "4,2", "-d", "5", "-r", "1"]) == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " t/s " in line or " d5 " in line]
    tests = table[0].index("test")
    assert [row[tests] for row in table] == ["test", "pp4 @ d5", "tg3 @ d5", "pp4+tg2 @ d5"]


def test_bench_takes_one_token_for_ids_where_no_file_is_called_so(capsys, tiny):
    assert cupy_main(["bench", "-m", tiny, "-p", "1", "-n", "0", "-r", "1", "--tokens", "1", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["n_prompt"] == 1


def test_run_says_how_many_tokens_it_generated(capsys):
    assert cupy_main(["run", "-m", MODEL, "-p", "The king", "-n", "5", "--json"]) == 0
    found = last_json(capsys)
    assert (found["n_gen"], found["generated_tokens"], len(found["tokens"])) == (5, 5, 5)
    assert found["decoded_tokens"] == 4, "the first token comes from the prompt's pass"
    assert found["avg_ts"] == pytest.approx(4 / found["decoded_seconds"], rel=1e-3)
    for n, words in (("5", "5 tokens, "), ("1", "1 token\n")):
        assert cupy_main(["run", "-m", MODEL, "-p", "The", "-n", n]) == 0
        out = capsys.readouterr().err
        assert f"decode            {words}" in out and "prompt            1 token, " in out


def test_bench_cold_finds_no_expert_resident_in_any_repetition(capsys, tiny):
    flags = ["bench", "-m", tiny, "-p", "0", "-n", "1", "-r", "3", "--cache", "100%", "-o", "json", "--tokens", "1,2"]
    assert cupy_main([*flags, "--no-warmup"]) == 0
    cold = json.loads(capsys.readouterr().out)[0]
    assert (cold["hits"], cold["warm"]) == (0, False)
    assert cold["misses"] == 3 * 3 * 2, "3 repetitions of 3 layers of 2 experts"
    assert cupy_main(flags) == 0
    warm = json.loads(capsys.readouterr().out)[0]
    assert (warm["misses"], warm["hits"], warm["warm"]) == (0, 18, True)


WRONG_REQUESTS = [
    (["bench", "-m", "{tiny}", "-pg", "0,0"], "nothing to measure"),
    (["bench", "-m", "{tiny}", "--tokens", "absent"], "--tokens absent: no such file, and no ids"),
    (["bench", "-m", "{tiny}", "--tokens", ""], "--tokens : no such file, and no ids"),
    (["routes", "record", "{tiny}", "--tokens", "", "-o", "{tmp}/r.npz"], "--tokens: expected ids"),
    (["run", "-m", "{tiny}", "-p", "x", "--host-cache", "nan"], "--host-cache 'nan'"),
    (["run", "-m", "{tiny}", "-p", "x", "--store", ""], "store: ''"),
    (["run", "-m", "{tiny}", "-p", "x", "-c", "-5"], "--ctx-size -5: expected a whole number, 0 to"),
    (["run", "-m", MODEL, "-p", "x", "--top-k", "-1", "--top-p", "1e30"], "--top-p is 1e+30"),
    (["plan", "qwen3-30b-a3b", "--pcie", ""], "--pcie"),
    (["bench", "-m", "{tiny}", "-pg", "0,0", "-p", "0", "-n", "0"], "nothing to measure"),
    (["run", "-m", "{tiny}", "-p", "x", "--store", "{tmp}/absent"], "{tmp}/absent: cannot be read"),
    (["repack", "-m", "{tiny}", "-o", "{tmp}/s", "--low", "Q2_K", "--verify"], "--verify writes nothing"),
    (["run", "-m", "{tiny}", "-p", "x", "--device", "cuda"], "--device cuda"),
    (["run", "-m", "{tiny}", "-p", "x", "--cache", "slots:1"], "smallest that works is slots:2"),
    (["run", "-m", "{tiny}", "-p", "x", "--cache", "many"], "--cache 'many'"),
    (["run", "-m", "{tiny}", "-p", "x"], "tokenizer.ggml.model"),
    (["run", "-m", MODEL, "-p", ""], "prompt has 0 tokens"),
    (["run", "-m", MODEL, "-p", "\udcff"], "-p: character 0 is not utf-8 text"),
    (["run", "-m", MODEL, "-p", "one two three four five", "-c", "4"], "the context holds 1..4"),
    (["logits", "-m", MODEL, "--tokens", "1,9999999999", "-o", "{tmp}/o.npz"], "--tokens: expected ids"),
    (["logits", "-m", MODEL, "--tokens", "1", "-o", ""], "no file to write"),
    (["check", "-m", "{tiny}", "--n-tokens", "129"], "the context holds 128"),
    (["doctor", "--folder", "{tmp}/absent"], "no such folder"),
    (["run", "-m", MODEL, "-p", "x", "-ctk", "q9"], "supported: f32, f16, bf16, q8_0, q4_0"),
    (["run", "-m", MODEL, "-p", "x", "--temp", "nan"], "temp"),
    (["run", "-m", MODEL, "-p", "x", "-t", "0"], "threads"),
    (["run", "-m", MODEL, "-f", "{tmp}/absent.txt"], "absent.txt"),
    (["run", "-m", MODEL, "-p", "x", "-sys", "y"], "-cnv"),
    (["run", "-m", "{tmp}", "-p", "x"], "{tmp}"),
    (["run", "-m", VALID, "-p", "x"], "GGUF"),
    (["logits", "-m", "{tiny}", "--tokens", "1,x", "-o", "{tmp}/o.npz"], "--tokens"),
    (["logits", "-m", "{tiny}", "--tokens", "96", "-o", "{tmp}/o.npz"], "0..95"),
    (["logits", "-m", "{tiny}", "--tokens", "1", "-o", "{tmp}/no/o.npz"], "no folder"),
    (["perplexity", "-m", MODEL, "-f", "{tmp}/tiny.gguf"], "UTF-8"),
    (["perplexity", "-m", MODEL, "-f", VALID, "-c", "1"], "at least 2"),
    (["perplexity", "-m", MODEL, "-f", VALID, "-c", "1000000"], "smaller -c"),
    (["run", "-m", MODEL, "-p", "x", "-c", "999999999"], "use at most -c"),
    (["bench", "-m", "{tiny}", "-p", "0", "-n", "0"], "nothing to measure"),
    (["bench", "-m", "{tiny}", "-p", "8", "-n", "0", "--tokens", "1,2"], "the test needs 8"),
]


@pytest.mark.parametrize(("flags", "words"), WRONG_REQUESTS, ids=[words for _, words in WRONG_REQUESTS])
def test_a_wrong_request_is_one_line_and_exit_code_2(flags, words, tiny, tmp_path, capsys):
    fill = {"tiny": tiny, "tmp": str(tmp_path)}
    assert cupy_main([flag.format(**fill) for flag in flags]) == 2
    captured = capsys.readouterr()
    last = captured.err.rstrip("\n").rsplit("\n", 1)[-1]
    assert last.startswith("error: ")
    assert words.format(**fill) in last
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not list(tmp_path.glob("*.npz"))


REFERENCE_ROUNDING = [["--act", "q8"], ["-ctk", "f16"], ["--cache-type-v", "bf16"]]


@pytest.mark.parametrize("flags", REFERENCE_ROUNDING, ids=" ".join)
def test_the_reference_rounds_where_asked_in_each_command_that_runs_a_model(flags, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small cat that lived near the sea. " * 4)
    results = []
    for extra in ([], flags):
        out = tmp_path / f"{len(extra)}.npz"
        assert ref_main(["logits", MODEL, "--tokens", "1,5,9,200", "-o", str(out), *extra]) == 0
        assert ref_main(["perplexity", MODEL, "-f", str(text), "-c", "16", "--chunks", "1", "--json", *extra]) == 0
        results.append((np.load(out)["logits"], last_json(capsys)["nll"]))
        assert ref_main(["generate", MODEL, "-p", "Once", "-n", "2", *extra]) == 0
    (plain, nll), (rounded, other) = results
    assert 0 < np.abs(plain - rounded).max() < 2
    assert 0 < abs(nll - other) < 0.05


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--act", "q4"], "--act: 'q4' is no rounding of activations; accepted: f32, q8"),
        (["-ctk", "q9"], "-ctk, --cache-type-k: 'q9' is no type of the KV cache; accepted: f32, f16, bf16, q8_0, q4_0"),
        (["--cache-type-v", ""], "-ctv, --cache-type-v: '' is no type of the KV cache; accepted: f32, f16, bf16"),
        (["-ctv", "q8_0"], "-ctv q8_0: its blocks of 32 do not divide the 16 numbers"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "-p", "x"], ["perplexity", "-f", VALID], ["logits", "--tokens", "1"]])
def test_the_reference_refuses_a_rounding_it_does_not_know_in_one_line(command, flags, words, tiny, tmp_path, capsys):
    output = ["-o", str(tmp_path / "o.npz")] if command[0] == "logits" else []
    assert ref_main([command[0], tiny, *command[1:], *output, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: " + words) and captured.err.count("\n") == 1
    assert captured.out == "" and not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["run", "-m", MODEL, "-p", "x", "-n", "-2"], "-n/--predict/--n-predict: -2: expected at least -1"),
        (["run", "-m", MODEL, "-p", "x", "--reads", "1000"], "--reads: 1000: expected 1 to 256"),
        (["check", "-m", MODEL, "--n-tokens", "0"], "--n-tokens: 0: expected at least 1"),
        (["bench", "-m", MODEL, "-p", "4,-4"], "-p/--n-prompt: -4: expected at least 0"),
        (["bench", "-m", MODEL, "-n", "a"], "expected a whole number, found 'a'"),
        (["run", "-m", MODEL, "-p", "x", "--device", "tpu"], "'tpu'"),
        (["run", "-m", MODEL, "-p", "x", "-n", str(10**30)], "expected -1 to 1000000000000"),
        (["bench", "-m", MODEL, "-r", str(10**30)], "-r/--repetitions: 1000000000000000000000000000000: expected 1 to"),
        (["perplexity", "-m", MODEL, "-f", VALID, "--chunks", "-5"], "--chunks: -5: expected at least 1"),
        (["plan", "qwen3-30b-a3b", "--vram", "1e30"], "--vram: 1e30: expected 0 to 1,000,000"),
        (["plan", "qwen3-30b-a3b", "--ram", "1e-30"], "--ram: 1e-30: expected above 0, 0.001 to"),
        (["replay", "--routes", "x", "--host", "101"], "--host: 101: expected above 0, 0.001 to 100"),
    ],
)
def test_a_flag_out_of_bounds_is_refused_by_name(flags, words, capsys):
    with pytest.raises(SystemExit) as ended:
        cupy_main(flags)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_context_that_is_full_and_threads_without_cores_are_told(capsys):
    too_many = str(1 + (os.cpu_count() or 1))
    assert cupy_main(["run", "-m", MODEL, "-p", "Once", "-c", "4", "-n", "8", "-t", too_many]) == 0
    said = capsys.readouterr().err
    assert "the context of 4 is full (-c)" in said and "cores; more threads" in said
    assert cupy_main(["run", "-m", MODEL, "-p", "Once", "-n", "2", "-t", "1"]) == 0
    said = capsys.readouterr().err
    assert "is full" not in said and "more threads" not in said


def test_a_context_longer_than_the_model_was_made_for_is_told(capsys):
    for ctx, told in (("256", False), ("300", True)):
        assert cupy_main(["run", "-m", MODEL, "-p", "The", "-n", "1", "-c", ctx]) == 0
        assert ("made for 256 tokens" in capsys.readouterr().err) is told


def test_a_full_disk_leaves_no_half_written_file_and_keeps_the_old_one(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o.npz"
    out.write_bytes(b"old")

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert ref_main(["logits", tiny, "--tokens", "1", "-o", str(out)]) == 1
    assert f"{out}: cannot be written whole: No space left" in capsys.readouterr().err
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.npz", "tiny.gguf"]


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (ref_main, ["logits", "{}", "--tokens", "1,2", "-o"]),
        (ref_main, ["dequantize", "{}", "output_norm.weight", "-o"]),
        (ref_main, ["quantize", "--type", "Q8_0", "{}"]),
        (cupy_main, ["logits", "-m", "{}", "--tokens", "1,2", "-o"]),
        (cupy_main, ["routes", "record", "-m", "{}", "--tokens", "1,2", "-o"]),
    ],
)
def test_an_output_that_is_the_input_is_refused_and_the_input_stays(main, words, tiny, tmp_path, capsys):
    link, before = tmp_path / "link.gguf", Path(tiny).read_bytes()
    link.symlink_to(tiny)
    for output in (tiny, str(link)):
        assert main([word.format(tiny) for word in words] + [output]) == 2
        assert "is the input itself" in capsys.readouterr().err
        assert Path(tiny).read_bytes() == before


def test_what_is_no_file_is_written_to_and_not_replaced(tiny, tmp_path):
    """Root's `-o /dev/null` must not make a file of the device; a pipe is the same case without the danger."""
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert ref_main(["logits", tiny, "--tokens", "1,2", "-o", str(pipe)]) == 0
    reader.join(600)
    assert pipe.is_fifo()
    (tmp_path / "o.npz").write_bytes(got[0])
    assert np.load(tmp_path / "o.npz")["tokens"].tolist() == [1, 2]


def test_a_link_keeps_its_place_and_its_target_is_written(tiny, tmp_path):
    link, target = tmp_path / "link.npz", tmp_path / "target.npz"
    link.symlink_to(target)
    for _ in range(2):  # dangling, then not
        assert ref_main(["logits", tiny, "--tokens", "1,2", "-o", str(link)]) == 0
        assert link.is_symlink()
        assert np.load(target)["tokens"].tolist() == [1, 2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
@pytest.mark.parametrize(
    "command", ["moe_ref inspect MODEL", "moe_ref tokenize MODEL -p x", "moe_cupy run MODEL -p The -n 3"]
)
def test_a_full_disk_behind_standard_output_is_one_line_and_exit_code_1(command):
    words = [sys.executable, "-m", *(MODEL if word == "MODEL" else word for word in command.split())]
    with open("/dev/full", "wb") as full:
        env = {**os.environ, "PYTHONUNBUFFERED": ""}  # short outputs wait in a buffer: the case to test
        done = subprocess.run(words, cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr.rstrip("\n").rsplit("\n", 1)[-1] == "error: [Errno 28] No space left on device"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_interrupting_a_run_ends_it_without_a_traceback():
    flags = ["-m", MODEL, "-p", "The", "-n", "-1", "-c", "4096", "--temp", "1"]
    command = [sys.executable, "-m", "moe_cupy", "run", *flags]
    # A shell starts background jobs with interrupts ignored, and children inherit that: `make test &` would hang here.
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(20)  # text has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)  # a run that does not hear it ends with 0
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_a_reader_that_goes_away_is_no_error_message():
    command = f"{shlex.join([sys.executable, '-m', 'moe_ref', 'inspect', MODEL])} | head -1"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "GGUF v3" in done.stdout
    assert done.stderr == ""
