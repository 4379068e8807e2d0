"""``plan --from-command``: llama.cpp's lines as people post them, what they mean and what is wrong with them."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from moe_cupy.__main__ import main
from moe_cupy.plan.llama_command import read_command, split_words


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
    assert any("-nkvo" in r for r in read_command("llama-server -m a.gguf -nkvo").remarks)
    assert not any("memory-mapped" in r for r in read_command("llama-server -m a.gguf -ot exps=CPU -rtr").remarks)
