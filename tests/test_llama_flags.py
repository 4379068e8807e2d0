"""What is written for llama.cpp: each of its flags is honoured, taken with a line, or refused by its name."""

from __future__ import annotations

import json

import pytest
from conftest import TESTS

from moe_cupy.cli import build_parser
from moe_cupy.cli import main as cupy_main
from moe_cupy.plan.flag_table import answers, is_known, others, spellings, table, values_of
from moe_ref.__main__ import build_parser as build_reference_parser
from moe_ref.__main__ import main as ref_main
from tests.models import Shape, tiny_moe

LLAMA = json.loads((TESTS / "data/llama_flags.json").read_text())
OPTIONS = LLAMA["options"]  # [spellings, negated spellings, what is taken, variable of the environment]
TEMPLATE = ["-ngl", "999", "-ot", "exps=CPU", "-c", "8192", "-fa", "on", "-b", "4096", "-ub", "4096", "-t", "24",
            "--no-mmap"]  # fmt: skip
COMMANDS = {"run": ["run", "m.gguf", "-p", "x"], "bench": ["bench", "m.gguf"]}
VALUES = {"-dev": "none", "--device": "none", "-fit": "on", "--fit": "off", "-ot": "exps=CPU", "-pg": "2,2",
          "--override-tensor": "exps=CPU", "-o": "json", "--output": "json"}  # fmt: skip


def every_flag() -> list[str]:
    return sorted({**spellings(), **others()})


def parsed(words, capsys, parser=None):
    """The arguments or, where they are refused, what was said."""
    try:
        return vars((parser or build_parser()).parse_args(words))
    except SystemExit as ended:
        said = capsys.readouterr()
        return said.err if ended.code else said.out


def test_all_flags_of_llama_cpp_are_in_the_table_with_as_many_values_as_they_take():
    """Names, arity and environment as its argument table has them: 355 options in 0.5.0-dev."""
    assert len(OPTIONS) == 355 and len(LLAMA["llama-bench"]) > 70
    for names, negated, kind, variable, _ in OPTIONS:
        for name in (*names, *negated):
            assert is_known(name), name
            assert values_of(name, ["x", "y"]) == {"void": 0, "bool": 0, "str_str": 2}.get(kind, 1) or name in (
                "-fa", "--flash-attn", "-fit", "--fit"), name  # fmt: skip
        if variable and variable.startswith("LLAMA_ARG_") and variable != "LLAMA_ARG_KV_OFFLOAD":
            assert table("flags")["environment"][variable] in names
    assert all(map(is_known, LLAMA["llama-bench"]))


def test_values_that_its_parser_refuses_are_known():
    parser = table("flags")["parser"]
    for kind, name in (("int", "whole"), ("float", "number")):
        assert set(parser[name]) == {flag for row in OPTIONS if row[2] == kind for flag in row[0]}
    of_several = {"--output-format"}  # two programs have one, with other words
    assert parser["words"] == {f: row[4] for row in OPTIONS if row[4] for f in row[0] if f not in of_several}
    current = {flag for row in OPTIONS if row[2] != "removed" for flag in (*row[0], *row[1])}
    assert not set(parser["older"]) & current
    assert set(parser["older"]) >= {flag for row in OPTIONS if row[2] == "removed" for flag in row[0]}


def right_value(flag: str) -> list[str]:
    words = table("flags")["parser"]["words"].get(flag)
    count = values_of(flag, ["2"])
    return [VALUES[flag]] if flag in VALUES else [words[0]] if words else ["2", "9"][:count]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_gets_one_of_three_answers_by_its_own_name(command, capsys):
    parser, counts = build_parser(), {"honoured": 0, "no effect": 0, "refused": 0}
    alone = parsed(COMMANDS[command], capsys, parser)
    own = parser._subparsers._group_actions[0].choices[command]._option_string_actions
    for flag in every_flag():
        value = right_value(flag)
        words = [word for word in COMMANDS[command] if word != "m.gguf" or flag not in ("-m", "--model")]
        if flag in ("-f", "--file", "-p", "--prompt") and command == "run":
            words = words[:2]
        got = parsed([*words, flag, *value], capsys, parser)
        if flag in own:
            kind = "honoured"
            assert isinstance(got, dict) or flag in ("-h", "--help", "--usage"), got
        elif isinstance(got, str):
            kind = "refused"
            assert len(got.splitlines()) == 2 and got.splitlines()[1].startswith(f"error: {flag}"), got
        else:
            kind = "no effect"
            assert got.pop("remarks")[0].startswith(flag) and got == {n: v for n, v in alone.items() if n != "remarks"}
        counts[kind] += 1
    assert min(counts.values()) > 20 and sum(counts.values()) == len(every_flag()), counts


def test_a_flag_has_one_answer_and_honoured_ones_have_none():
    rows = [flag for row in table("flags")["run"] for flag in row["flags"]]
    assert len(rows) == len(set(rows)) and all(map(is_known, rows))
    parser = build_parser()._subparsers._group_actions[0].choices
    run = parser["run"]._option_string_actions
    honoured = set(run) | set(parser["bench"]._option_string_actions) | set(parser["perplexity"]._option_string_actions)
    assert not set(rows) & set(run)
    assert {flag for flag in every_flag() if flag not in answers()} <= honoured
    assert {row["answer"] for row in table("flags")["run"]} == {"no effect", "refused"}


SPLIT = [  # (command line, what it was read as by argparse, what is said of it)
    (["-fa", "on"], "-f a", "no effect"),
    (["-tb", "2"], "-t b", "no effect"),
    (["-mla", "3"], "two models", "no effect"),
    (["-hf", "x/y:Q4_K_M"], "-h -f", "error: -hf x/y:Q4_K_M: nothing is downloaded here: give a file with -m FILE"),
    (["-np", "4"], "-n p", "error: -np 4: one sequence at a time"),
    (["-mg", "1"], "-m g", "error: -mg 1: the first GPU"),
    (["-n8"], "-n 8", "error: -n8: there is no such flag; a value stands apart: -n 8"),
    (["-c4096"], "-c 4096", "error: -c4096: there is no such flag; a value stands apart: -c 4096"),
    (["-vh"], "-v -h", "error: -vh: there is no such flag"),
    (["--pref", "none"], "--prefetch", "error: --pref: there is no such flag"),
    (["--polcy", "lru"], "", "error: --polcy: there is no such flag; did you mean --policy?"),
    (["--ctx-sized", "1"], "", "did you mean --ctx-size?"),
    (["--n-gpu-layer", "1"], "--n-gpu-layers", "did you mean --n-gpu-layers?"),
    (["-e5"], "-e -5", "error: -e5: there is no such flag"),
    (["-5"], "", "error: -5: there is no such flag"),
]


@pytest.mark.parametrize(("words", "_", "said"), SPLIT, ids=[" ".join(words) for words, *_ in SPLIT])
def test_no_flag_is_split_or_guessed(words, _, said, capsys):
    for command in COMMANDS.values():
        got = parsed([*command, *words], capsys)
        assert said in (got if isinstance(got, str) else got["remarks"][0])


def test_nor_in_the_other_commands(capsys):
    lines = [["plan", "qwen3-30b-a3b"], ["doctor"], ["replay", "--routes", "x"], ["synth"], ["routes", "info", "x"],
             ["repack", "m", "-o", "s"], ["gpu-check"], ["check", "m"], ["logits", "m"],
             ["perplexity", "m"]]  # fmt: skip
    for line in lines:
        for flag in (["-hf", "x"], ["--js"], ["-xyz", "1"]):
            said = parsed([*line, *flag], capsys)
            assert isinstance(said, str) and f"error: {flag[0]}" in said, (line, said)
    for line in (["generate", "m", "-p", "x"], ["tokenize", "m", "-p", "x"], ["inspect", "m"], ["logits", "m"]):
        for flag in (["-hf", "x"], ["--js"], ["-pfoo"], ["--cache", "1"]):
            said = parsed([*line, *flag], capsys, build_reference_parser())
            assert said.splitlines()[-1].startswith(f"error: {flag[0]}: there is no such flag")


def test_values_are_whole_words_whatever_they_begin_with(capsys):
    for text in ("-text", "-hf", "--help", "--", "", "-1", "a=b", "-x=1 y"):
        assert parsed(["run", "m", "-p", text], capsys)["prompt"] == text
        assert parsed(["generate", "m", "-p", text], capsys, build_reference_parser())["prompt"] == text
    got = parsed(["run", "-n", "-1", "-s", "-1", "--temp=-1", "-p", "x", "m"], capsys)
    assert (got["predict"], got["seed"], got["temp"], got["model"]) == (-1, -1, -1.0, "m")
    got = parsed(["run", "m", "-p", "x", "--ctx-size=8192", "-ngl=99", "--n_predict", "3", "--top_k=5"], capsys)
    assert (got["ctx_size"], got["n_gpu_layers"], got["predict"], got["top_k"]) == (8192, "99", 3, 5)
    assert "error: -c: expected a value behind it" in parsed(["run", "m", "-p", "x", "-c"], capsys)
    for wrong in (["-fa", "maybe"], ["-tb", "all"], ["-sm", "rows"], ["--xtc-threshold", "x"]):
        assert f"error: {' '.join(wrong)}: expected" in parsed(["run", "m", "-p", "x", *wrong], capsys)
    assert "error: -tb: expected a value behind it" in parsed(["run", "m", "-p", "x", "-tb"], capsys)


NEUTRAL = [("--repeat-penalty", "1.0", "1.1"), ("--presence-penalty", "0", "0.5"), ("-np", "1", "2"),
           ("--mirostat", "0", "2"), ("--top-nsigma", "-1", "1"), ("--rope-freq-base", "0", "1e6"),
           ("--samplers", "top_k;top_p;min_p;temperature", "temperature;top_k"), ("--typical", "1.00", "0.9"),
           ("--reasoning-budget", "-1", "0"), ("-gan", "1", "4"), ("--rope-freq-base", "0.0", "nan")]  # fmt: skip


@pytest.mark.parametrize(("flag", "neutral", "other"), NEUTRAL)
def test_what_would_change_a_text_is_refused_unless_its_value_changes_nothing(flag, neutral, other, capsys):
    assert parsed(["run", "m", "-p", "x", flag, neutral], capsys)["remarks"][0].startswith(f"{flag} {neutral}: no eff")
    assert f"error: {flag} {other}: " in parsed(["run", "m", "-p", "x", flag, other], capsys)


def test_devices_by_their_names_there(capsys):
    for name, device in (("CUDA0", "cuda"), ("none", "host"), ("emulated", "emulated"), ("ROCm0", "cuda")):
        assert parsed(["run", "m", "-p", "x", "-dev", name], capsys)["device"] == device
    assert "one GPU is used" in parsed(["run", "m", "-p", "x", "--device", "CUDA0,CUDA1"], capsys)
    assert "invalid choice: 'Vulkan0'" in parsed(["run", "m", "-p", "x", "--device", "Vulkan0"], capsys)


def test_the_environment_is_read_as_by_programs_of_llama_cpp(capsys, monkeypatch):
    for name, value in {"LLAMA_ARG_CTX_SIZE": "64", "LLAMA_ARG_N_GPU_LAYERS": "9", "LLAMA_ARG_HOST": "::",
                        "LLAMA_ARG_CPU_MOE": "1", "LLAMA_ARG_MODEL": "e.gguf", "LLAMA_ARG_TOP_K": "",
                        "LLAMA_ARG_MMPROJ_AUTO": "0"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    got = parsed(["run", "-p", "x", "-ngl", "3"], capsys)
    assert (got["ctx_size"], got["n_gpu_layers"], got["model"], len(got["overrides"])) == (64, "3", "e.gguf", 1)
    assert got["remarks"][0].startswith("from the environment: -c 64 -ngl 9") or "-c 64" in got["remarks"][0]
    assert any(r.startswith("--host: no effect here") for r in got["remarks"])
    assert parsed(["run", "m", "-p", "x"], capsys)["model"] == "m"
    assert parsed(["bench", "m"], capsys)["ctx_size"] == 0, "llama-bench does not read it"
    monkeypatch.setenv("LLAMA_ARG_REPEAT_PENALTY", "1.3")
    said = parsed(["run", "-p", "x"], capsys)
    assert "error: --repeat-penalty 1.3: " in said and "environment" in said


def test_switches_have_values_in_bench_as_in_llama_bench(capsys):
    words = "bench m -fa 0,1 -mmp 0 -nkvo 0 -nopo 1 --no-host 0 --repack 1 -embd 0 -mg 0 -sm none --delay 0".split()
    got = parsed([*words, "--poll", "50", "-C", "0x0", "-b", "2048", "-ub", "512", "-r", "1"], capsys)
    two = parsed(["bench", "m", "-ot", "up_exps=CPU;down_exps=CUDA0", "-fit", "0"], capsys)
    assert [rule.device for rule in two["overrides"]] == ["CPU", "CUDA0"] and two["fit"] == "off"
    assert got["model"] == ["m"] and (got["ubatch_size"], got["batch_size"], got["repetitions"]) == (512, 2048, 1)


def test_escapes_are_read_where_asked():
    from moe_ref.command import unescaped

    assert unescaped(r"a\nb\tc\x41\\n\q\"") == 'a\nb\tcA\\n\\q"'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(tiny_moe(tmp_path_factory.mktemp("m") / "tiny.gguf", Shape()))


@pytest.mark.parametrize("device", ["host", "emulated"])
def test_the_line_of_the_field_runs_as_it_stands(device, tiny, tmp_path, capsys):
    words = [tiny, *TEMPLATE, "--device", device]
    assert cupy_main(["logits", *words, "--tokens", "1,2,3", "-o", str(tmp_path / "x.npz")]) == 0
    said = capsys.readouterr().err
    assert "-fa: no effect here" in said and "--no-mmap: no effect here" in said
    assert cupy_main(["bench", *words, "-p", "4", "-n", "2", "-r", "1", "-o", "json"]) == 0
    assert [r["n_ubatch"] for r in json.loads(capsys.readouterr().out)] == [4096, 4096]
    if device == "host":
        assert "one memory: -ngl 999, -ot have no effect" in said


def test_help_names_every_flag_in_groups_with_its_default(capsys):
    said = parsed(["run", "--help"], capsys)
    for title in ("prompt and length", "choosing tokens", "computing", "experts in memory"):
        assert f"\n{title}:\n" in said
    assert "(default: 512)" in said and "usage: moe-cupy run MODEL (-p TEXT | -f FILE) [FLAGS]\n" in said


def test_a_mistake_is_one_line_of_usage_and_one_of_what_is_wrong(capsys):
    for main, words in ((cupy_main, ["run"]), (cupy_main, ["plan", "x", "-c", "a"]), (ref_main, ["generate", "m"])):
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and len(said) == 2, said
        assert said[0].startswith("usage: moe-") and said[1].startswith("error: ")
