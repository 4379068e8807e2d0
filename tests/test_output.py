"""What commands print, and where: the result alone on stdout, the rest on stderr, less with --quiet."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_cupy import this_machine
from moe_cupy.cli import build_parser as cupy_parser
from moe_cupy.cli import main as cupy_main
from moe_cupy.plan.choose import make_plan
from moe_cupy.plan.emit import command
from moe_cupy.plan.hardware import machine_called
from moe_cupy.plan.planner import Request
from moe_cupy.plan.shapes import preset
from moe_ref import __version__, console, tokenizer
from moe_ref.__main__ import build_parser as ref_parser
from moe_ref.__main__ import main as ref_main
from moe_ref.common_flags import commands_of
from moe_ref.generation import Generation, chain
from moe_ref.sampling import Sampler
from tests.models import Shape, tiny_moe

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "data" / "moe-40m-Q4_K_M.gguf")
BOTH = [(ref_main, "generate"), (cupy_main, "run")]


@pytest.fixture
def tiny(tmp_path) -> str:
    return str(tiny_moe(tmp_path / "tiny.gguf", Shape()))


def stdin_of(text: bytes) -> SimpleNamespace:
    return SimpleNamespace(buffer=io.BytesIO(text), isatty=lambda: False)


# Streams


@pytest.mark.parametrize(("main", "name"), BOTH)
def test_stdout_is_the_text_and_the_statistics_are_on_stderr_unless_quiet(main, name, capsys):
    texts = []
    for quiet in ([], ["--quiet"]):
        assert main([name, MODEL, "-p", "The king", "-n", "4", *quiet]) == 0
        said = capsys.readouterr()
        texts.append(said.out)
        assert ("finish reason" in said.err, "sampler" in said.err) == (not quiet, not quiet)
        assert not quiet or said.err == ""
    assert texts[0] == texts[1] and texts[0].startswith("The king") and texts[0].count("\n") == 1


@pytest.mark.parametrize("main", [ref_main, cupy_main])
def test_every_command_takes_quiet_and_says_its_version(main, capsys):
    for build in (ref_parser, cupy_parser):
        assert all("--quiet" in sub._option_string_actions for sub in commands_of(build()) if len(sub._actions) > 1)
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{'moe-ref' if main is ref_main else 'moe-cupy'} {__version__}\n"


def test_a_warning_that_changes_the_meaning_is_printed_even_with_quiet(capsys):
    assert cupy_main(["run", MODEL, "-p", "Once", "-c", "4", "-n", "8", "--quiet"]) == 0
    assert "warning: stopped after" in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.parametrize(("main", "name"), BOTH)
def test_a_prompt_comes_from_standard_input(main, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", stdin_of(b"The king"))
    assert main([name, MODEL, "-f", "-", "-n", "2", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("The king")
    monkeypatch.setattr(sys, "stdin", stdin_of(b"\xff"))
    assert main([name, MODEL, "-f", "-", "-n", "2"]) == 2
    assert "standard input: is not UTF-8 text (byte 0)" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", stdin_of(b""))
    assert main([name, MODEL, "-f", "-", "-n", "2"]) == 2
    assert "the prompt has 0 tokens" in capsys.readouterr().err


def test_texts_to_tokenize_and_to_score_come_from_standard_input_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", stdin_of(b"The king"))
    assert ref_main(["tokenize", MODEL, "-f", "-"]) == 0
    assert len(capsys.readouterr().out.split()) == 2
    for main in (ref_main, cupy_main):
        monkeypatch.setattr(sys, "stdin", stdin_of(b"Once upon a time there was a cat. " * 4))
        assert main(["perplexity", MODEL, "-f", "-", "-c", "8", "--chunks", "1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == 7


# How a text was made, and why it ended


def made(main, name, capsys, *flags: str) -> dict:
    assert main([name, MODEL, "-p", "The king", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(("main", "name"), BOTH)
def test_a_drawn_seed_is_shown_and_makes_the_same_text_again(main, name, capsys):
    flags = ["-n", "6", "--temp", "1.5"]
    first, second = (made(main, name, capsys, *flags) for _ in range(2))
    assert first["seed"] != second["seed"] and first["seed"] >= 0
    again = made(main, name, capsys, *flags, "-s", str(first["seed"]))
    assert again["tokens"] == first["tokens"] and again["seed"] == first["seed"]
    assert first["sampler"] == "top-k 40 -> top-p 0.95 -> min-p 0.05 -> temp 1.5 -> dist"
    assert (first["finish_reason"], first["truncated"]) == ("length", False)
    assert made(main, name, capsys, "-n", "1")["sampler"] == "greedy"


def test_a_sampler_chain_leaves_out_what_is_off():
    assert chain(Sampler(temp=0.7, top_k=0, top_p=1.0, min_p=0.0, seed=1)) == "temp 0.7 -> dist"
    assert chain(Sampler(temp=0.7, top_k=5, top_p=1.0, min_p=0.1, seed=1)) == "top-k 5 -> min-p 0.1 -> temp 0.7 -> dist"


@pytest.mark.parametrize(
    ("n_prompt", "made", "asked", "capacity", "reason", "truncated"),
    [
        (3, 5, 5, 100, "length", False),
        (3, 0, 0, 100, "length", False),
        (3, 5, -1, 100, "stop", False),
        (3, 5, 8, 8, "stop", False),  # the stop token came when the context had just become full
        (3, 6, -1, 8, "length", True),
        (3, 6, 9, 8, "length", True),
        (3, 6, 6, 8, "length", False),  # both ends at once: it is what was asked for
    ],
)
def test_finish_reasons(n_prompt, made, asked, capacity, reason, truncated):
    generation = Generation(Sampler(seed=1), n_prompt, [0] * made, asked, capacity)
    assert (generation.finish_reason, generation.is_truncated) == (reason, truncated)


def test_a_stop_token_is_the_finish_reason_stop(monkeypatch, capsys):
    second, real = made(cupy_main, "run", capsys, "-n", "2")["tokens"][1], tokenizer.load_tokenizer

    def ending_there(metadata):
        loaded = real(metadata)
        loaded.eog_ids = frozenset([second])
        return loaded

    monkeypatch.setattr(tokenizer, "load_tokenizer", ending_there)
    monkeypatch.setattr("moe_cupy.engine.engine.load_tokenizer", ending_there)
    for main, name in BOTH:
        got = made(main, name, capsys, "-n", "8")
        assert (got["finish_reason"], len(got["tokens"])) == ("stop", 1)


# Progress


class Clock:
    now = 0.0


class Bar:
    """What tqdm is asked, and told."""

    def __init__(self, **given):
        self.given, self.done = given, 0
        Bar.last = self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, count):
        self.done += count


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(console.time, "monotonic", lambda: Clock.now)
    Clock.now = 0.0
    return Clock


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(clock, capsys):
    for _ in console.with_progress(range(100), "chunks", 100):
        clock.now += 0.5
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "chunks: 4%, about 48 s left"
    assert len(said) == 5, "from two seconds on, every ten"


def test_short_work_and_quiet_work_show_no_progress(clock, capsys, monkeypatch):
    for _ in console.with_progress(range(10), "chunks", 10):
        clock.now += 0.1
    monkeypatch.setattr(console.Settings, "quiet", True)
    for _ in console.with_progress(range(10), "chunks", 10):
        clock.now += 100
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_waits_two_seconds(monkeypatch):
    monkeypatch.setattr(console.Settings, "bar", Bar)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    assert list(console.with_progress(range(3), "experts", 3)) == [0, 1, 2]
    assert (Bar.last.done, Bar.last.given["delay"], Bar.last.given["total"]) == (3, 2.0, 3)


def test_a_prompt_counts_its_layers_and_ends_with_all_of_them(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(console.Settings, "bar", Bar)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True, write=len, flush=lambda: None))
    from moe_cupy import Engine

    with Engine(tiny, device="host", progress=True, ubatch_size=2) as engine:
        engine.prefill([1, 2, 3, 4, 5])
        assert (Bar.last.given["desc"], Bar.last.done) == ("prompt", 5 * len(engine.config.layers))
        engine.decode(1)
        assert Bar.last.done == 5 * len(engine.config.layers), "a generated token is no part of the prompt"


# Completion


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize("main", [ref_main, cupy_main])
def test_bash_accepts_the_completion(main, capsys):
    pytest.importorskip("argcomplete")
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 0
    name = "moe-ref" if main is ref_main else "moe-cupy"
    script = capsys.readouterr().out + f"\ncomplete -p {name}"
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and name in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("moe-cupy ", ["run", "bench", "inspect", "quantize"]),
        ("moe-cupy run --ca", ["--cache"]),
        ("moe-cupy run -m x.gguf --device ", ["host", "cuda"]),
        ("moe-cupy routes ", ["record", "info", "import"]),
        ("moe-ref generate --te", ["--temp"]),
    ],
)
def test_completion_answers_with_commands_flags_and_values(line, offered, monkeypatch):
    argcomplete = pytest.importorskip("argcomplete")
    monkeypatch.setattr(os, "environ", os.environ | {"_ARGCOMPLETE": "1"})
    finder = argcomplete.CompletionFinder((ref_parser if "ref" in line else cupy_parser)())
    _, prefix, _, words, _ = argcomplete.lexers.split_line(line)
    assert set(offered) <= set(finder._get_completions(words, prefix, "", None))


def test_completion_without_argcomplete_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    with pytest.raises(SystemExit) as ended:
        ref_main(["--print-completion", "bash"])
    assert ended.value.code == 2
    assert "pip install 'moe-offload[completion]'" in (said := capsys.readouterr().err) and said.count("\n") == 1


# Commands of the reference


def test_inspect_and_quantize_are_commands_of_both(tiny, tmp_path, capsys):
    said = []
    for main in (ref_main, cupy_main):
        assert main(["inspect", tiny]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert cupy_main(["quantize", tiny, str(tmp_path / "q.gguf"), "--type", "Q8_0", "--quiet"]) == 0
    assert (tmp_path / "q.gguf").exists() and capsys.readouterr().err == ""


# plan


@pytest.mark.parametrize("hardware", ["rtx3060-32g", "rtx5090-192g", "desktop-64g"])
@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite"])
@pytest.mark.parametrize("kinds", [("f16", "f16"), ("q4_0", "bf16")])
def test_the_printed_command_is_one_that_this_program_accepts(hardware, model, kinds):
    request = Request(ctx=8192, ctk=kinds[0], ctv=kinds[1])
    plan = make_plan(preset(model), machine_called(hardware), request)
    words = shlex.split(command(plan, "moe-cupy"))
    assert words[0] == "moe-cupy"
    args = cupy_parser().parse_args(words[1:])
    assert (args.ctx_size, args.device) == (8192, "cuda" if plan.machine.gpu else "host")
    assert args.cache_type_k == args.cache_type_v == {"f16": "f16", "q4_0": "f16"}[kinds[0]]
    assert not args.remarks
    if plan.cache_slots and plan.cache_slots < plan.model.experts:
        assert args.cache == f"slots:{plan.cache_slots}"


def planned(capsys, *flags: str) -> dict:
    assert cupy_main(["plan", "qwen3-30b-a3b", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_plan_without_hardware_is_for_this_machine_and_says_what_is_assumed(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(this_machine, "free_and_total", lambda: (40 * 10**9, 64 * 10**9))
    monkeypatch.setattr(this_machine, "first_card", lambda: "")
    plan = planned(capsys)
    assert plan["hardware"] == "this machine" and plan["vram_bytes"] == 0
    [said] = [line for line in plan["warnings"] if "this machine" in line]
    for words in ("64 GB of RAM", "no NVIDIA GPU", "assumed: DDR4-3200", "doctor --write", "--hardware"):
        assert words in said
    monkeypatch.setattr(this_machine, "first_card", lambda: "NVIDIA GeForce RTX 5080, 16303")
    plan = planned(capsys)
    assert 0 < plan["vram_bytes"] <= 16 * 2**30 and plan["commands"]["moe-cupy"].startswith("moe-cupy run ")
    monkeypatch.setattr(this_machine, "first_card", lambda: "Voodoo 2, 12")
    assert "Voodoo 2" in " ".join(planned(capsys)["warnings"])


def test_a_measured_profile_of_this_machine_is_found(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profile = this_machine.profile_path()
    profile.parent.mkdir(parents=True)
    profile.write_text("ram_gb = 48\nram_bandwidth = 33.0\ncores = 3\ndisk_read = 2.5\n")
    plan = planned(capsys)
    assert plan["hardware"] == "this machine" and f"as measured in {profile}" in " ".join(plan["warnings"])
    assert " -t 3" in plan["commands"]["llama.cpp"]
    assert planned(capsys, "--hardware", "rtx5080-128g")["hardware"] == "rtx5080-128g"


# bench


BENCH = ["bench", "-p", "4", "-n", "2", "-r", "1", "--quiet"]


def test_bench_measures_all_combinations_in_one_table(tiny, tmp_path, capsys):
    other = str(tiny_moe(tmp_path / "other,with comma.gguf", Shape()))
    sweep = ["-m", tiny, "-m", other, "--cache", "slots:4,100%", "--policy", "lru,echo"]
    assert cupy_main([*BENCH, *sweep, "-o", "csv"]) == 0
    said = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(said.out)))
    got = [(row["model_filename"], int(row["cache_slots"]), row["policy"], int(row["n_gen"])) for row in rows]
    slots = sorted({row[1] for row in got})
    assert len(slots) == 2 and slots[0] == 4
    want = [(m, s, p, n) for m in (tiny, other) for s in slots for p in ("lru", "echo") for n in (0, 2)]
    assert got == want and said.err == ""


def test_bench_writes_sql_that_a_database_reads(tiny, capsys):
    assert cupy_main([*BENCH, tiny, "--policy", "lru,lfu", "-o", "sql"]) == 0
    database = sqlite3.connect(":memory:")
    database.executescript(capsys.readouterr().out)
    found = database.execute("SELECT policy, n_prompt, n_gen, avg_ts > 0 FROM moe_cupy_bench").fetchall()
    assert found == [(policy, *n, 1) for policy in ("lru", "lfu") for n in ((4, 0), (0, 2))]


@pytest.mark.parametrize("flags", [["--policy", "lru,many"], ["--prefetch", ","]])
def test_bench_refuses_a_name_in_a_list(flags, tiny, capsys):
    with pytest.raises(SystemExit) as ended:
        cupy_main([*BENCH, tiny, *flags])
    assert ended.value.code == 2 and "is unknown; accepted: " in capsys.readouterr().err


# Speeds without what happens once


def test_the_first_use_of_a_kernel_is_counted_apart(tiny, monkeypatch):
    from moe_cupy import Engine
    from moe_cupy.kernels.first_use import first_use

    with Engine(tiny, device="host") as engine:
        forward, clock = engine.forward, SimpleNamespace(now=0.0)
        monkeypatch.setattr("moe_cupy.kernels.first_use.time", SimpleNamespace(perf_counter=lambda: clock.now))
        monkeypatch.setattr("moe_cupy.engine.engine.time", SimpleNamespace(perf_counter=lambda: clock.now))

        def slow(*given):
            with first_use():
                clock.now += 30
            clock.now += 2
            return forward(*given)

        monkeypatch.setattr(engine, "forward", slow)
        engine.prefill([1, 2, 3, 4])
        assert (engine._stats.prompt_seconds, engine._stats.warmup_seconds) == (2, 30)
        assert engine._stats.prompt_tok_s == 2
        assert "in 30.00 s at their first use" in str(engine._stats)
