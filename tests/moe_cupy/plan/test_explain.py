"""``plan --explain``: every figure is what its formula says, recomputed from the printed line."""

from __future__ import annotations

import re
from math import comb

import pytest

from moe_cupy.__main__ import main

UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "T": 1e12}
NUMBER = r"\d[\d.]*(?:e[+-]?\d+)?"
CLOSE = 1.2e-3  # four digits are printed on each side


def value(formula: str) -> float:
    """A printed formula by its own arithmetic: units scale the number before them, other words are passed over."""
    text = re.sub(r"\((in|of) [^)]*\)", "", formula).replace("GB/s", "GB").replace("T/s", "T").replace("^", "**")
    text = re.sub(rf"({NUMBER}) ?(TB|GB|MB|kB|B|us|ms|T)\b", lambda m: f"({m[1]} * {UNITS[m[2]]:.0e})", text)
    text = re.sub(r"\bx\b", "*", re.sub(r"\)\s*B\b", ")", text))
    text = re.sub(r"(?<![\d.])[A-Za-z]+", " ", text)
    assert re.fullmatch(r"[\d.e+\-*/() ]+", text), formula
    return float(eval(text))  # digits, signs and brackets alone


def explained(capsys, *words: str) -> list[str]:
    assert main(["plan", *words, "--explain"]) == 0
    return capsys.readouterr().out.splitlines()


TERM = re.compile(r" +(?P<ms>[\d.]+) ms +(?P<share>\d+)%  (?P<name>[^:]*): (?P<formula>.*)")
PLANS = [
    ["glm-4.5-air"], ["qwen3-30b-a3b", "--mode", "static"], ["deepseek-r1"], ["mixtral-8x22b", "-ctk", "q8_0"],
    ["gpt-oss-20b", "--vram", "0"], ["qwen3-next-80b-a3b", "-ub", "2048"], ["gemma-4-26b-a4b", "--vram", "8"],
    ["qwen3-235b-a22b", "-ngl", "99", "--cpu-moe", "-ub", "16"], ["kimi-k2", "--ram", "64", "--vram", "24"],
    ["llama-4-scout", "-ngl", "20", "--cpu-moe", "-c", "65536"], ["minimax-m2", "--mode", "cache"],
]  # fmt: skip


@pytest.mark.parametrize("words", PLANS, ids=" ".join)
def test_each_term_is_what_its_formula_says(capsys, words):
    lines = explained(capsys, *words)
    sums, rows = [], 0
    for line in lines:
        if match := TERM.fullmatch(line):
            seconds = value(match["formula"].partition(", the mean of")[0])
            assert seconds == pytest.approx(1e-3 * float(match["ms"]), rel=CLOSE, abs=6e-7), line
            sums.append(float(match["ms"]))
            rows += 1
        elif whole := re.fullmatch(r" +([\d.]+) ms +in all: (.*) = (.*) tok/s", line):
            assert float(whole[1]) == pytest.approx(sum(sums), abs=0.001 * len(sums))
            assert value(whole[2]) == pytest.approx(float(whole[3]), rel=CLOSE)
            sums = []
    assert rows >= 4 and not sums


@pytest.mark.parametrize("words", PLANS, ids=" ".join)
def test_speeds_hits_memory_and_the_turn_follow_from_what_is_printed(capsys, words):
    lines = explained(capsys, *words)
    text = "\n".join(lines)
    in_all = [float(s) for s in re.findall(r"in all: .* = (\S+) tok/s", text)]
    shown = [float(s) for s in re.findall(r"^(?:decode|prompt) +([\d.]+) tok/s", text, re.MULTILINE)]
    assert shown == pytest.approx(in_all, rel=CLOSE, abs=0.051)
    turn, formula = re.search(r"^turn +([\d.]+) s .*\n +(.*) s$", text, re.MULTILINE).groups()
    assert value(formula) == pytest.approx(float(turn), rel=CLOSE, abs=0.051)
    for name in ("KV", "buffers", "expert cache"):
        for formula, size in re.findall(rf"^    {name}: (.*) = (.*)$", text, re.MULTILINE):
            assert value(formula.replace("of an expert tensor", "")) == pytest.approx(value(size), rel=CLOSE), name
    if hits := re.search(r"^hit rate +([\d.]+)% +(1 - .*?): ", text, re.MULTILINE):
        assert value(hits[2]) == pytest.approx(float(hits[1]) / 100, rel=CLOSE, abs=6e-4)
    if both := re.search(r"(\d+) = (\d+ x \d+ / \d+) \(ik", text):
        assert int(both[1]) == -(-value(both[2]) // 1)


def test_the_wait_for_experts_from_disk_is_the_mean_that_is_printed(capsys, tmp_path):
    profile = tmp_path / "mine.toml"
    profile.write_text("ram_gb = 9\ncores = 2\nram_bandwidth = 30\ndisk_read = 2\n[measured]\nlayer_us = 300\n")
    text = "\n".join(explained(capsys, "gpt-oss-20b", "--hardware", str(profile)))
    found = re.search(r"(\d+) layers x (\S+) us, the mean of max\(0, m x (.*?) - (\d+) x (\S+) us\), "
                      r"m of (\d+) missing, each with (\S+)%", text)  # fmt: skip
    read, compute, used, missed = value(found[3]), 1e-6 * float(found[5]), int(found[6]), float(found[7]) / 100
    mean = sum(comb(used, m) * missed**m * (1 - missed) ** (used - m) * max(0.0, m * read - int(found[4]) * compute)
               for m in range(1, used + 1))  # fmt: skip
    assert 1e6 * mean == pytest.approx(float(found[2]), rel=5e-3)
