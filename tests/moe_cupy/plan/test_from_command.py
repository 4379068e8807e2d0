"""``plan --from-command``: llama.cpp's lines as people post them, what they mean and what is wrong with them."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_cupy.__main__ import main
from moe_cupy.plan import PlanError
from moe_cupy.plan.advice import changes
from moe_cupy.plan.flag_table import others, spellings
from moe_cupy.plan.hardware import machine_called
from moe_cupy.plan.llama_command import read_command
from moe_cupy.plan.llama_words import split_words
from moe_cupy.plan.memory import use_of
from moe_cupy.plan.planner import Request, static_plan
from moe_cupy.plan.rules import GPU, cpu_moe
from moe_cupy.plan.shapes import preset


def planned(capsys, *words: str) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


LINE = r"""CUDA_VISIBLE_DEVICES=0 ./build/bin/llama-server \
  -m /models/Qwen3-30B-A3B-Q4_K_M.gguf -ngl 99 -ot "blk\.([0-9])\.ffn_.*_exps=CUDA0,exps=CPU" \
  -c 32768 -fa -ctk q8_0 -ctv q8_0 -ub 4096 -b 2048 --jinja --port 8080 --frobnicate"""


def test_a_command_is_explained(capsys):
    assert main(["plan", "--from-command", LINE, "--hardware", "rtx4090-96g"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"blk\.9\.ffn_up_exps\.weight .* VRAM +-ot", said)
    assert re.search(r"blk\.10\.ffn_up_exps\.weight .* RAM +-ot exps=CPU", said)
    for remark in ("--frobnicate: not known", "-ub 4096 above -b 2048", "--fit changes nothing", "memory-mapped"):
        assert remark in said


def test_words_of_either_system():
    assert split_words("llama-server.exe -m C:\\m\\a.gguf `\n -ngl 99") == ["llama-server.exe", "-m", "C:\\m\\a.gguf",
                                                                          "-ngl", "99"]  # fmt: skip
    assert split_words('a \\\n \'b c\' "d\\"e"') == ["a", "b c", 'd"e']


FORUM = [
    ("llama-server -m a.gguf --n_gpu_layers 99 --cache_type_k q8_0 --top_p 0.9", {"ngl": "99", "ctk": "q8_0"}),
    ("llama-server -m a.gguf -fa 1 -c 4096", {"ctx": 4096}),
    ("numactl --interleave=all ./llama-server -m a.gguf -ngl 7", {"ngl": "7"}),
    ("C:\\x\\llama-server.exe -m a.gguf -ngl 7", {"ngl": "7"}),
    ("LLAMA_ARG_N_GPU_LAYERS=5 LLAMA_ARG_CTX_SIZE=512 llama-server -m a.gguf -c 1024", {"ngl": "5", "ctx": 1024}),
    ("GGML_OP_OFFLOAD_MIN_BATCH=2048 llama-server -m a.gguf", {"threshold": 2048}),
    ("llama-server -m a.gguf -ub 4096", {"ubatch": 2048}),
    ("llama-server -m a.gguf -ub 4096 -b 4096", {"ubatch": 4096}),
    ("llama-server -m a.gguf -ub 0 -b 1024", {"ubatch": 1024}),
]


@pytest.mark.parametrize(("line", "wanted"), FORUM, ids=[line for line, _ in FORUM])
def test_lines_as_people_post_them(line, wanted):
    said = read_command(line)
    assert said.model == "a.gguf" and {name: getattr(said.request, name) for name in wanted} == wanted
    assert not [r for r in said.remarks if "not known" in r]


def test_an_unknown_flag_and_its_value_are_one_remark():
    said = read_command("llama-server -m a.gguf --whatever x --bias -1 --switch -ngl 3")
    assert [r.partition(":")[0] for r in said.remarks if "not known" in r] == ["--whatever", "--bias", "--switch"]
    assert said.request.ngl == "3"


def test_a_repository_names_the_model(capsys):
    line = "llama-server -hf unsloth/Qwen3-30B-A3B-GGUF:Q5_K_M -ngl 99 -ot exps=CPU"
    plan = planned(capsys, "--from-command", line)
    assert (plan["model"], plan["quant"]) == ("qwen3-30b-a3b", "Q5_K_M")


def test_the_command_keeps_the_file_and_the_threads_of_the_line(capsys):
    line = "llama-server -m /m/Qwen3-30B-A3B-Q4_K_M.gguf -ngl 99 -ncmoe 30 -t 16"
    words = shlex.split(planned(capsys, "--from-command", line)["commands"]["llama.cpp"])
    assert words[words.index("-m") + 1] == "/m/Qwen3-30B-A3B-Q4_K_M.gguf" and words[words.index("-t") + 1] == "16"


def test_what_a_line_asks_for_and_is_not_planned_is_said():
    assert any("-ts 3,1" in r for r in read_command("llama-server -m a.gguf -ts 3,1").remarks)
    assert not any("memory-mapped" in r for r in read_command("llama-server -m a.gguf -ot exps=CPU -rtr").remarks)


MISSION = machine_called("rtx5080-128g")


@pytest.mark.parametrize(("line", "over"), [
    ("llama-server -m Qwen3-30B-A3B-Q8_0.gguf -ngl 99", "weights"),
    ("llama-server -m Qwen3-30B-A3B-Q4_K_M.gguf -ngl 99 -ncmoe 20 -c 40960 -ub 4096 -b 4096", "experts"),
    ("llama-server -m Qwen3-30B-A3B-Q4_K_M.gguf -ngl 99 -ot exps=CPU -c 400000", "context"),
])  # fmt: skip
def test_a_line_that_overfills_a_card_is_explained_all_the_same(capsys, line, over):
    """Every tensor with its place, how many MiB are too many, and changes each of which makes it fit."""
    assert main(["plan", "--from-command", line]) == 2
    said = capsys.readouterr()
    assert said.out.count(" VRAM  ") > 300 and "does not fit" in said.out and "a line that fits" in said.out
    command = read_command(line)
    model = preset("qwen3-30b-a3b", "Q8_0" if "Q8_0" in line else "Q4_K_M")
    plan = static_plan(model, MISSION, replace(command.request, overfull=True))
    mib = -(-(use_of(model, plan.placement, plan.settings, GPU).total - 16 * 2**30) // 2**20)
    assert f"{mib} MiB" in said.err and "Traceback" not in said.err
    for change in re.search(r"nearest that works: (.*)", said.err)[1].split(" or "):
        with_it = f"{line} {change.removesuffix(' instead of -ot')}"
        if "instead" in change or "--n-cpu-moe" in change or "--cpu-moe" in change:
            with_it = re.sub(r" (-ot \S+|-ncmoe \d+)(?= |$)", "", line) + " " + change.removesuffix(" instead of -ot")
        assert not static_plan(model, MISSION, replace(read_command(with_it).request, overfull=True)).too_full, change


def test_the_tensors_of_a_line_that_does_not_fit_are_in_the_json(capsys):
    assert main(["plan", "--from-command", "llama-server -m Qwen3-235B-A22B-Q4_K_M.gguf -ngl 99", "--json"]) == 2
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["fits"] is False and len(plan["tensors"]) > 10 and "MiB" in plan["warnings"][0]


def test_the_context_in_host_memory():
    """-nkvo: no past on the card, and it costs."""
    model, line = preset("qwen3-30b-a3b"), "llama-server -m a.gguf -ngl 99 -ncmoe 48 -c 16384"
    plans = [static_plan(model, MISSION, read_command(line + more).request) for more in ("", " -nkvo")]
    assert plans[0].use.past > 10**9 and plans[1].use.past == 0
    assert plans[1].use.weights == plans[0].use.weights and plans[1].decode_tok_s < plans[0].decode_tok_s


@pytest.mark.parametrize(("more", "used"), [
    ("--override-kv qwen3moe.expert_used_count=int:4", 4), ("-ser 6,1", 6), ("-ser 6,0.5", None), ("", None),
])  # fmt: skip
def test_fewer_experts_a_token(more, used):
    assert read_command(f"llama-server -m a.gguf {more}").request.used == used


def test_prompts_stay_on_the_cpu_without_op_offload():
    model, line = preset("qwen3-30b-a3b"), "llama-server -m a.gguf -ngl 99 -ot exps=CPU"
    names = [t.name for t in static_plan(model, MISSION, read_command(line + " -nopo").request).prompt_terms]
    assert any("by the CPU" in name for name in names) and not any("once a batch" in name for name in names)


def test_mapped_pages_are_copied_more_slowly():
    model, line = preset("qwen3-30b-a3b"), "llama-server -m a.gguf -ngl 99 -ot exps=CPU"
    speed = [static_plan(model, MISSION, read_command(line + more).request).prefill_tok_s
             for more in ("", " --no-mmap", " -lm none", " --load-mode mmap")]  # fmt: skip
    assert speed[0] == speed[3] < speed[1] == speed[2]


@pytest.mark.parametrize("flag", sorted({**spellings(), **others()}))
def test_every_flag_of_both_engines_is_known(flag):
    """Planned with, told about, or named as of no matter; whichever, it takes its value with it."""
    takes = {**others(), **spellings()}[flag][1]
    value = {"-ot": "exps=CPU", "--override-tensor": "exps=CPU", "-fa": "on", "--flash-attn": "on",
             "-fit": "on", "--fit": "on"}.get(flag, "2")  # fmt: skip
    said = read_command(f"llama-server -m a.gguf {flag} {value if takes else ''} -ngl 7")
    assert said.request.ngl in ("7", "2") and not [r for r in said.remarks if "not known" in r]
    if flag in others():
        assert [r for r in said.remarks if flag in r]


REFUSED = [  # what llama.cpp's parser (common/arg.cpp) refuses, and what is said of it
    ("--n-cpu-moe=20", "--n-cpu-moe=20: a flag and its value are two words there: --n-cpu-moe 20"),
    ("--ctx_size=4096", "--ctx_size=4096: a flag and its value are two words there: --ctx-size 4096"),
    ("--flash-attn=on", "--flash-attn=on: a flag and its value are two words"),
    ("-ot '_exps=CPU;blk.1.=CUDA0'", "rules are parted by commas, as _exps=CPU,blk.1.=CUDA0"),
    ("-ot 'exps=CPU;'", "there is no device 'CPU;'"), ("-ot exps=GPU", "there is no device 'GPU'"),
    ("-ot exps", "-ot 'exps': expected REGEX=DEVICE"), ("-fa maybe", "-fa maybe: expected one"),
    ("--temp hot", "--temp hot: expected a number"), ("-tb all", "-tb all: expected a whole number"),
    ("-n -p hello", "-n -p: expected a whole number"), ("-sm rows", "-sm rows: expected one of none, layer, row"),
    ("--load-mode fast", "--load-mode fast: expected one of auto, none, mmap"),
    ("-ctk q3_k", "-ctk q3_k: unknown"), ("-c", "-c is the last word and needs a value"), ("-c 4k", ""),
    ("-ngl most", "-ngl most: expected a number of layers"), ("-ncmoe -1", "-ncmoe -1: expected a whole number"),
    ("--numa all", "--numa all: expected one of distribute, isolate, numactl"), ("-c eight", "-c eight: expected"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_llama_cpp_refuses_is_said_to_be_refused(words, said, capsys):
    line = f"llama-server -m qwen3-30b-a3b-Q4_K_M.gguf {'' if '-ngl' in words else '-ngl 99'} -ncmoe 40 {words}"
    code = main(["plan", "--from-command", line])
    err = capsys.readouterr().err
    assert code == 2 and said in err.splitlines()[-1] and "Traceback" not in err


def test_a_refused_line_is_planned_as_it_was_meant(capsys):
    line = "llama-server -m qwen3-30b-a3b-Q4_K_M.gguf -ngl 99 --n-cpu-moe=20 -c 8192 --json"
    assert main(["plan", "--json", "--from-command", line.removesuffix(" --json")]) == 2
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert got["warnings"][0].startswith("llama.cpp refuses this line: --n-cpu-moe=20")
    asked = planned(capsys, "--from-command", line.replace("=", " ").removesuffix(" --json"))
    assert got["decode_tok_s"] == asked["decode_tok_s"] and got["commands"] == asked["commands"]


def test_lists_are_of_llama_bench_and_older_spellings_a_remark():
    assert not read_command("llama-bench -m a.gguf -tb 1,x -ot 'a=CPU;b=CUDA0' --poll 0-50+10").refused
    said = read_command("llama-server -m a.gguf --no-mmap --temp 0.7 -s -1 -fa on --top-p .9")
    assert not said.refused and any("it is --load-mode none now" in r for r in said.remarks)
    assert not any("--load-mode none now" in r for r in read_command("llama-server -m a -fmoe --no-mmap").remarks)


LINES = [
    ("docker run --gpus all -v /m:/m ghcr.io/ggml-org/llama.cpp:server-cuda -m a.gguf -ngl 7", "7"),
    ("$env:CUDA_VISIBLE_DEVICES=0; .\\llama-server.exe -m a.gguf `\r\n -ngl 7", "7"),
    ("set CUDA_VISIBLE_DEVICES=0 && llama-server.exe -m a.gguf ^\r\n -ngl 7", "7"),
    ("llama-server -m a.gguf \\  \n # the card\n -ngl 7 2>&1 | tee log.txt", "7"),
    ("llama-server \u2013m a.gguf \u2014ngl 7", "7"),
    ("llama-server -m \u201ca b.gguf\u201d -ngl 7", "7"),
    ("LLAMA_ARG_N_GPU_LAYERS=7 LLAMA_ARG_CPU_MOE=1 llama-server -m a.gguf", "7"),
    ("export GGML_CUDA_ENABLE_UNIFIED_MEMORY=1; ./build/bin/llama-server -m a.gguf -ngl 7", "7"),
    ("./server -m a.gguf -ngl 7", "7"),
]


@pytest.mark.parametrize(("line", "layers"), LINES, ids=[line[:30] for line, _ in LINES])
def test_lines_of_shells_and_forums(line, layers):
    said = read_command(line)
    assert said.request.ngl == layers and said.model in ("a.gguf", "a b.gguf")
    assert not [r for r in said.remarks if "not known" in r]


def test_further_cards_are_counted_on_the_first_and_said():
    said = read_command('ik/llama-server -m a.gguf -ngl 99 -ot "blk.1.=CUDA0,blk.2.=CUDA1,exps=CUDA_Host" -fmoe')
    assert [rule.device for rule in said.request.overrides] == ["CUDA0", "CUDA0", "CPU"]
    assert any(r.startswith("CUDA1: one card") for r in said.remarks) and said.engine == "ik_llama.cpp"


words = st.one_of(
    st.sampled_from(sorted({**spellings(), **others()})), st.text(max_size=12),
    st.sampled_from(["exps=CPU", "99", "-1", "q8_0", "auto", "on", "\\\n", "^\n", "'", '"', "|", "=", "A=b", "2,1",
                     "C:\\m\\a.gguf", "999999999", "qwen3-30b-a3b-Q4_K_M.gguf", "-", "--", "--ngl=3", "\u2013c"]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(words, max_size=12))
def test_no_line_is_a_traceback(parts):
    """A command, or a sentence about it."""
    try:
        said = read_command("llama-server " + " ".join(parts))
    except PlanError as error:
        assert str(error) and "\n" not in str(error).replace("\\n", "")
        return
    assert all(isinstance(remark, str) for remark in said.remarks)


@settings(max_examples=40, deadline=None)
@given(st.lists(words, max_size=8))
def test_no_line_is_a_traceback_when_planned(parts):
    line = "llama-server -m qwen3-30b-a3b-Q4_K_M.gguf " + " ".join(parts)
    assert main(["plan", "--from-command", line, "--json"]) in (0, 2)


def test_the_command_keeps_what_the_line_asked_for_beside_places(capsys):
    """Else the line that is printed would put the context on the card again."""
    line = "llama-server -m Qwen3-30B-A3B-Q4_K_M.gguf -ngl 99 -ncmoe 48 -c 8192 -nkvo --no-op-offload"
    line += " --override-kv qwen3moe.expert_used_count=int:4"
    commands = planned(capsys, "--from-command", line)["commands"]
    asked, again = read_command(line).request, read_command(commands["llama.cpp"]).request
    assert (again.kv_on_host, again.threshold, again.used) == (True, asked.threshold, 4)
    again = read_command(commands["ik_llama.cpp"]).request
    assert again.kv_on_host and again.used == 4


def test_other_types_are_compared_with_as_many_experts_a_token():
    """Qwen3-30B with 4 experts a token instead of 8, in Q6_K: the advice of Q5_K_M is for 4 as well."""
    model = replace(preset("qwen3-30b-a3b", "Q6_K"), expert_used_count=4)
    plan = static_plan(model, MISSION, Request(ngl="99", overrides=cpu_moe()))
    change = next(other for text, other in changes(plan) if text.startswith("Q5_K_M"))
    assert change()[0].expert_used_count == 4


def test_the_command_keeps_the_repository_of_the_line(capsys):
    line = "llama-server -hf unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M -ncmoe 99"
    words = shlex.split(planned(capsys, "--from-command", line)["commands"]["llama.cpp"])
    assert "-m" not in words and words[words.index("-hf") + 1] == "unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M"


def test_the_command_is_for_the_system_of_the_line(capsys):
    line = r'llama-server.exe -m "D:\My Models\Qwen3-30B-A3B-Q4_K_M.gguf" -ncmoe 99'
    command = planned(capsys, "--from-command", line)["commands"]["llama.cpp"]
    assert command.startswith(r'llama-server.exe -m "D:\My Models\Qwen3-30B-A3B-Q4_K_M.gguf" ')


def test_biases_of_experts_are_no_dense_tensors(capsys):
    """llama.cpp's pattern for --n-cpu-moe finds them too, and nothing crosses the link for them."""
    said = planned(capsys, "--from-command", "llama-server -m gpt-oss-120b.gguf -ngl 99 -ncmoe 36 --load-mode none")
    assert not [line for line in said["warnings"] if "dense tensors" in line]
    said = planned(capsys, "--from-command", "llama-server -m gpt-oss-120b.gguf -ngl 99 -ot attn_q=CPU,exps=CPU")
    assert [line for line in said["warnings"] if "dense tensors" in line]


def test_lines_of_llama_bench():
    """It parts rules by semicolons, and takes several values of most flags."""
    rules = read_command("llama-bench -m a.gguf -ot 'blk.1.ffn=CPU;exps=CUDA0'").request.overrides
    assert [(r.pattern, r.device) for r in rules] == [("blk.1.ffn", "CPU"), ("exps", "CUDA0")]
    with pytest.raises(PlanError, match="-ncmoe 10,20: a list"):
        read_command("llama-bench -m a.gguf -ncmoe 10,20")


@pytest.mark.parametrize(("line", "told"), [
    ("koboldcpp --model a.gguf", True), ("python serve.py -m a.gguf", True), ("-m a.gguf", False),
    ("sudo nice -n 5 ./llama-server -m a.gguf", False), ("LLAMA_ARG_NGL=3 llama-cli -m a.gguf", False),
])  # fmt: skip
def test_a_program_of_others_is_said(line, told):
    assert any("no program of" in remark for remark in read_command(line).remarks) == told


def test_a_line_without_a_model_says_what_it_lacks(capsys):
    assert main(["plan", "--from-command", "ollama run qwen3:30b"]) == 2
    assert "the line names no model" in capsys.readouterr().err
