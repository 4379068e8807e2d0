"""The ``plan`` command: the JSON contract, bad requests, other engines' commands, and the flags in ``run``."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from moe_cupy.__main__ import main
from moe_cupy.plan.choose import make_plan
from moe_cupy.plan.emit import command, numbers_below, quote
from moe_cupy.plan.hardware import machine_called
from moe_cupy.plan.llama_command import read_command
from moe_cupy.plan.planner import Request, static_plan
from moe_cupy.plan.rules import n_cpu_moe, parse_overrides
from moe_cupy.plan.shapes import preset
from moe_cupy.plan.tables import ENGINES
from moe_ref.split import open_model
from tests.effort import calls_of

ARCHS = Path(__file__).resolve().parents[2] / "data" / "archs"
ROUTES = ARCHS.parents[2] / "data" / "moe-40m-routes.npz"
MISSION = machine_called("rtx5080-128g")


def planned(capsys, *words: str) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *words: str) -> str:
    """The one line on stderr of a request that is refused."""
    try:
        code = main(["plan", *words])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2 and "Traceback" not in said.err and said.out == ""
    return said.err.splitlines()[-1]


def test_the_json_contract(capsys):
    plan = planned(capsys, "qwen3-235b-a22b", "--quant", "IQ3_XXS")
    wanted = {"model": str, "hardware": str, "fits": bool, "decode_tok_s": float, "prefill_tok_s": float,
              "vram_bytes": int, "ram_bytes": int, "disk_bytes": int, "cache_slots": int, "hit_rate": float,
              "tensors": list, "commands": dict, "warnings": list}  # fmt: skip
    assert {name: type(plan[name]) for name in wanted} == wanted
    assert set(plan["commands"]) == {"moe-cupy", "llama.cpp", "ik_llama.cpp"}
    assert {"pattern", "where", "bytes"} <= set(plan["tensors"][0])


@pytest.mark.parametrize("words", [["glm-4.5-air"], ["deepseek-v2-lite", "-ot", r"blk\.[2-4]\.ffn_.*_exps=CPU"],
                                   ["gemma-4-26b-a4b", "--n-cpu-moe", "9"]])  # fmt: skip
def test_patterns_of_the_tensors_find_each_once(capsys, words):
    plan, model = planned(capsys, *words), preset(words[0])
    for row in plan["tensors"]:
        found = [t for t in model.tensors if re.search(row["pattern"], t.name)]
        assert (len(found), sum(t.nbytes for t in found)) == (row["tensors"], row["bytes"])
    assert sum(row["bytes"] for row in plan["tensors"]) == model.nbytes


@pytest.mark.parametrize("path", sorted(ARCHS.glob("*.gguf")), ids=lambda p: p.stem)
def test_every_file_is_planned(capsys, path):
    plan = planned(capsys, str(path), "--hardware", "rtx3060-32g")
    assert plan["fits"] and plan["decode_tok_s"] > 0


def test_a_split_file_is_planned_as_a_whole(capsys, shared):
    parts = sorted((shared / "data/golden/split").glob("*.gguf"))
    plan = planned(capsys, str(parts[0]))
    with open_model(parts[0]) as file:
        assert sum(row["bytes"] for row in plan["tensors"]) == sum(t.nbytes for t in file.tensors.values())


BAD = [
    (["qwen3-30b"], "qwen3-30b-a3b"),
    ([], "presets: "),
    (["qwen3-30b-a3b", "--quant", "Q4KM"], "Q4_K_M"),
    (["qwen3-30b-a3b", "--hardware", "rtx5800"], "rtx5080-128g"),
    (["qwen3-30b-a3b", "--hardware", "nowhere.toml"], "nowhere.toml"),
    (["qwen3-30b-a3b", "--pcie", "6x3"], "4x16"),
    (["qwen3-30b-a3b", "-ot", "exps"], "REGEX=DEVICE"),
    (["qwen3-30b-a3b", "-ot", "exps=cpu"], "did you mean CPU"),
    (["qwen3-30b-a3b", "-ot", "(exps=CPU"], "')' is missing"),
    (["qwen3-30b-a3b", "-ot", "blk\\.{1,2}=CPU"], "a comma ends a rule"),
    (["qwen3-30b-a3b", "--cpu-moe", "--n-cpu-moe", "3"], "contradict"),
    (["qwen3-30b-a3b", "-ngl", "0", "--cpu-moe"], "-ngl 0"),
    (["qwen3-30b-a3b", "-ngl", "lots"], "-ngl lots"),
    (["qwen3-235b-a22b", "-ngl", "99"], "--n-cpu-moe"),
    (["qwen3-30b-a3b", "-ngl", "99", "--cpu-moe", "-c", "400000"], "-c "),
    (["kimi-k2", "--quant", "BF16", "--vram", "0", "--ram", "16"], "fits nowhere"),
    (["qwen3-30b-a3b", "--vram", "1"], "--vram 0"),
    (["qwen3-30b-a3b", "--vram", "1.8"], "nearest that works: -ub 128"),
    (["qwen3-30b-a3b", "--routes", str(ROUTES)], "of a model with 32 experts"),
    (["qwen3-30b-a3b", "-ngl", "99", "-ot", "attn=CPU"], "instead of -ot"),
    (["qwen3-30b-a3b", "-c", "99999999999"], "nearest that works: -c 40960"),
    (["qwen3-30b-a3b", "-ot", "(" * 3000 + ")" * 3000 + "=CPU"], "nested too deep"),
    (["qwen3-30b-a3b", "-ot", "a{99999999999}=CPU"], "no pattern"),
    (["--from-command", "llama-server -m qwen3-30b-a3b.gguf -ncmoe 999999999"], "up to 4096"),
    (["qwen3-235b-a22b", "-c", "1000000"], "stay in host memory"),
    (["qwen3-30b-a3b", "--ram", "0"], "above 0"),
    (["qwen3-30b-a3b", "--ram-bw", "0"], "above 0"),
    (["qwen3-30b-a3b", "--mode", "cache", "--cpu-moe"], "drop one"),
    (["qwen3-30b-a3b", "--mode", "cache", "--vram", "0"], "needs a GPU"),
    (["nothere.gguf"], "there is no such file"),
    (["qwen3-30b-a3b", "--from-command", "llama-server -m 'x"], "quotes"),
    (["--from-command", "llama-server -m qwen3-30b-a3b-Q4_K_M.gguf -c"], "needs a value"),
    (["--from-command", "llama-server -m qwen3-30b-a3b-Q4_K_M.gguf -ngl abc -ot exps=CPU"], "-ngl abc"),
    (["--from-command", "llama-server -m qwen3-30b-a3b-Q4_K_M.gguf", "-ngl", "3"], "--from-command with -ngl"),
    (["--from-command", ""], "no model"),
    (["qwen3-30b-a3b", "-ctk", "q3_k"], "q8_0"),
    (["qwen3-30b-a3b", "--vram", "24", "--hardware", "desktop-64g"], "has no GPU"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "hint"), BAD, ids=[" ".join(words)[:60] or "nothing" for words, _ in BAD])
def test_a_bad_request_is_told_in_a_sentence_with_the_nearest_that_works(capsys, words, hint):
    assert hint in refused(capsys, *words)


@pytest.mark.parametrize(("text", "hint"), [
    ("ram_gb = 64", "cores"),
    ("ram_gb = 64\ncores = 8", "ram or ram_bandwidth"),
    ("ram_gb = 64\ncores = 8\nram = 'DDR5-5601'", "DDR5-5600"),
    ("ram_gb = 'much'\ncores = 8", "expected a number above 0"),
    ("ram_gb = -1\ncores = 8", "expected a number above 0"),
    ("ram_gb = 64\ncores = 8\nram = 'DDR5-5600'\ngpu = 'RTX 9999'", "unknown"),
    ("ram_gb = 64\ncores = 8\nram = 'DDR5-5600'\ngpuu = 'RTX 5080'", "did you mean gpu"),
    ("ram_gb = = 3", "is not TOML"),
    ("ram_gb = 64\ncores = 8\nram = 'DDR5-5600'\ndisk = 'floppy'", "nvme-gen4"),
])  # fmt: skip
def test_a_bad_profile_names_the_field(capsys, tmp_path, text, hint):
    (tmp_path / "mine.toml").write_text(text)
    assert hint in refused(capsys, "qwen3-30b-a3b", "--hardware", str(tmp_path / "mine.toml"))


def test_no_model_file_at_all(capsys, tmp_path):
    (tmp_path / "text.gguf").write_text("this is no model")
    assert "text.gguf" in refused(capsys, str(tmp_path / "text.gguf"))


def test_a_name_that_is_no_file_is_planned_from_its_name(capsys):
    plan = planned(capsys, "Qwen3-30B-A3B-Instruct-Q5_K_M.gguf")
    assert (plan["model"], plan["quant"]) == ("qwen3-30b-a3b", "Q5_K_M") and "no such file" in plan["warnings"][0]


# Other engines' commands


@pytest.mark.parametrize("name", ["qwen3-235b-a22b", "deepseek-v3", "gpt-oss-20b", "gemma-4-26b-a4b"])
@pytest.mark.parametrize("engine", ENGINES[1:3])
def test_a_command_read_back_places_what_it_was_made_for(name, engine):
    """Emit, read, place: the same tensors in host memory as the static plan had."""
    plan = static_plan(preset(name), MISSION, Request(ctx=8192))
    for windows in (False, True):
        said = read_command(command(plan, engine, windows))
        again = static_plan(plan.model, MISSION, said.request)
        assert again.placement.device == plan.placement.device
        assert replace(again.settings, pageable=False) == plan.settings and again.decode_tok_s == pytest.approx(
            plan.decode_tok_s
        )
        assert not [r for r in said.remarks if "not known" in r]


@pytest.mark.parametrize("n", [1, 7, 10, 11, 19, 20, 42, 99, 100, 131])
def test_a_pattern_for_the_first_layers(n):
    pattern = re.compile(numbers_below(n))
    assert [i for i in range(200) if pattern.fullmatch(str(i))] == list(range(n))


def test_manual_rules_keep_their_order_in_a_command():
    rules = (*parse_overrides(r"blk\.0\.=CUDA0,exps=CPU"),)
    plan = static_plan(preset("deepseek-v2-lite"), MISSION, Request(overrides=rules))
    words = shlex.split(command(plan, "llama.cpp"))
    assert words[words.index("-ot") + 1] == r"blk\.0\.=CUDA0,exps=CPU"


AWKWARD = [
    r"blk\.(0|1)\.ffn_.*_exps=CPU",
    "a b",
    "it's",
    "$HOME^&|<>",
    "100%",
    "C:\\models\\x.gguf",
    'say "x"',
    "",
    "x\\",
]


@pytest.mark.skipif(shutil.which("sh") is None, reason="no POSIX shell here")
def test_posix_quoting_survives_a_shell():
    line = quote(["printf", r"%s\n", *AWKWARD], windows=False)
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == AWKWARD


def test_windows_quoting():
    """By the rules of PowerShell and of CommandLineToArgvW: backslashes double before a closing quote."""
    assert quote([r"blk\.(0|1)\.x=CPU"], True) == r'"blk\.(0|1)\.x=CPU"'
    assert quote(["C:\\m\\x.gguf"], True) == "C:\\m\\x.gguf"
    assert quote(["my models\\"], True) == '"my models\\\\"'
    assert quote(["exps$=CPU"], True) == "'exps$=CPU'" and quote(["it's $1"], True) == "'it''s $1'"


def test_ktransformers_rules_name_each_layer_once():
    plan = make_plan(preset("deepseek-v3"), MISSION, Request())
    text = command(plan, "ktransformers")
    layers = [int(n) for group in re.findall(r"layers\\\\\.\(([\d|]+)\)", text) for n in group.split("|")]
    assert sorted(layers) == list(range(3, 61)) and text.startswith("# python -m ktransformers")


def test_ktransformers_rules_follow_flags_given_by_hand():
    rules = tuple(parse_overrides(r"blk\.([0-9])\.ffn_(up|gate|down)_exps=CPU"))
    request = Request(ngl="99", overrides=rules)
    text = command(static_plan(preset("deepseek-v2-lite"), MISSION, request), "ktransformers")
    found = re.findall(r"layers\\\\\.\(([\d|]+)\).*?generate_device: \"(\w+)\"", text, re.DOTALL)
    assert found == [("1|2|3|4|5|6|7|8|9", "cpu"), ("|".join(map(str, range(10, 27))), "cuda")]


def test_a_command_alone_comes_with_its_warnings_on_stderr(capsys):
    assert main(["plan", "deepseek-r1", "--emit", "llama.cpp"]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and "host memory is short" in said.err


def test_a_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["plan", "glm-4.5-air", "--plot", str(tmp_path / "speed.png"), "--json"]) == 0
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


# The same flags in run


@pytest.mark.parametrize(("words", "hint"), [
    (["-ot", "exps=cpu"], "did you mean CPU"),
    (["--cpu-moe", "--n-cpu-moe", "2"], "contradict"),
    (["-ngl", "0", "--cpu-moe"], "-ngl 0"),
    (["-ngl", "some"], "-ngl some"),
])  # fmt: skip
def test_run_refuses_what_plan_refuses(capsys, tmp_path, words, hint):
    file = str(ARCHS / "olmoe.BF16.gguf")
    try:
        code = main(["logits", file, "--tokens", "1,2", "-o", str(tmp_path / "x.npz"), "--device", "host", *words])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and hint in said.splitlines()[-1]


def test_run_says_what_the_flags_mean_on_the_host_device(capsys, tmp_path):
    file = str(ARCHS / "olmoe.BF16.gguf")
    words = ["logits", file, "--tokens", "1,2", "-o", str(tmp_path / "x.npz"), "--device", "host", "--n-cpu-moe", "2"]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "--fit is off" in said and "one memory: --n-cpu-moe has no effect" in said
    assert "\n--n-cpu-moe: 6 tensors, " in said


def test_run_says_of_every_rule_what_it_got(capsys, tmp_path):
    """A tensor goes by the first rule that finds it, and counts there alone."""
    words = ["logits", str(ARCHS / "olmoe.BF16.gguf"), "--tokens", "1,2", "-o", str(tmp_path / "x.npz"), "--device"]
    rules = r"blk\.0\.ffn_up_exps=CPU,blk\.0\.ffn_.*_exps=CPU,exps=CPU,no_such=CPU"
    assert main([*words, "host", "-ot", rules, "--n-cpu-moe", "1"]) == 0
    said = [line.rpartition(", ")[0] for line in capsys.readouterr().err.splitlines() if "tensor" in line]
    with open_model(ARCHS / "olmoe.BF16.gguf") as file:
        left = sum("_exps" in name for name in file.tensors) - 3
    assert said == [
        r"-ot blk\.0\.ffn_up_exps=CPU: 1 tensor",
        r"-ot blk\.0\.ffn_.*_exps=CPU: 2 tensors",
        f"-ot exps=CPU: {left} tensors",
        "-ot no_such=CPU: 0 tensors",
        "--n-cpu-moe: 0 tensors",
    ]


def test_n_cpu_moe_of_a_deep_model_is_one_short_rule_elsewhere_and_planned_quickly():
    model = preset("qwen3-235b-a22b")
    request = Request(ngl="99", overrides=tuple(n_cpu_moe(200)))
    # 94 patterns searched in 1131 names; every pattern read again for every name is many times that.
    assert calls_of(lambda: static_plan(model, MISSION, request)) < 2_000_000
    words = shlex.split(command(static_plan(model, MISSION, request), "ik_llama.cpp"))
    rules = parse_overrides(words[words.index("-ot") + 1])
    assert len(rules) == 1
    routed = [t.name for t in model.tensors if t.part == "routed"]
    assert [t.name for t in model.tensors if rules[0].found_in(t.name)] == routed


def test_dense_layers_below_n_cpu_moe_are_no_reason_for_a_warning():
    plan = static_plan(preset("glm-4.5-air"), MISSION, Request(ngl="99", overrides=tuple(n_cpu_moe(45))))
    assert not [w for w in plan.warnings if "find no tensor" in w]


def test_an_impossible_request_keeps_the_json_contract(capsys):
    assert main(["plan", "qwen3-235b-a22b", "-ngl", "99", "--json"]) == 2
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    fits = planned(capsys, "gpt-oss-20b")
    assert said["fits"] is False and "--n-cpu-moe" in said["warnings"][0]
    for name in ("model", "hardware", "decode_tok_s", "prefill_tok_s", "vram_bytes", "ram_bytes", "disk_bytes",
                 "cache_slots", "hit_rate", "tensors", "commands", "warnings"):  # fmt: skip
        assert type(said[name]) is type(fits[name])


def test_the_longest_context_that_is_named_fits_and_the_next_does_not(capsys):
    words = ["qwen3-30b-a3b", "-ngl", "99", "--cpu-moe", "-c"]
    longest = int(refused(capsys, *words, "400000").partition("nearest that works: -c ")[2].split()[0])
    plan = planned(capsys, *words, str(longest))
    assert any("more than the 40960 tokens" in w for w in plan["warnings"])
    assert refused(capsys, *words, str(longest + 256))


def test_the_smallest_context_that_may_be_chosen_is_kept(capsys):
    assert planned(capsys, "qwen3-30b-a3b", "-fitc", "30000")["ctx"] >= 30000


def test_a_cache_that_costs_context_says_so_and_what_prompts_would_be_without_it(capsys):
    assert main(["plan", "glm-4.5-air", "--vram", "8"]) == 0
    said = capsys.readouterr().out
    assert "a context of 4096: 16384 leaves no room" in said and re.search(r"without a cache.*, prompts \d", said)


def test_flags_that_place_nothing_are_said(capsys):
    plan = planned(capsys, "qwen3-30b-a3b", "--vram", "0", "-ngl", "99")
    assert any("place nothing" in w for w in plan["warnings"])


def test_a_picture_that_cannot_be_written_is_a_sentence(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for name, hint in (("none/a.png", "cannot be written: No such file"), ("a.foo", "'foo' is not supported")):
        path = str(tmp_path / name)
        assert main(["plan", "deepseek-v2-lite", "--plot", path]) == 2
        said = capsys.readouterr().err
        assert hint in said and path in said and "Errno" not in said


def test_advice_compares_plans_of_the_mode_that_was_asked_for(capsys):
    """All of DeepSeek-V2-Lite fits the card: faster host memory gains nothing, though --mode static is quicker."""
    assert main(["plan", "deepseek-v2-lite", "--mode", "cache"]) == 0
    said = capsys.readouterr().out
    assert "DDR5-6400" not in said and "-ctk q8_0" not in said
