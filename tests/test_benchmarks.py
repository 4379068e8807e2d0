"""What the comparison with llama.cpp computes from its runs, and what it asks of the system."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks import limits
from benchmarks.disk import busy_seconds
from benchmarks.vs_llama_cpp import memory_limit, speed, table


def run(tg: float = 0.0, code: int = 0, rss: int = 100 << 20) -> dict:
    good = {"tg8": [tg], "first_token_at": 1.0, "first_token_s": 0.5}
    return {"code": code, "peak_rss": rss} | ({} if code else good)


def pair(ours: dict, theirs: dict, llama: str = "best") -> dict:
    same = {"model": "m", "limit": "25%", "threads": 1, "flags": "", "test": "tg8"}
    return same | {"llama": llama, "ours": ours, "theirs": theirs}


def test_the_table_has_the_median_ratio_of_pairs_with_the_least_and_the_most():
    pairs = [pair(run(8.0), run(2.0)), pair(run(6.0), run(3.0)), pair(run(9.0, rss=200 << 20), run(3.0))]
    row = table(pairs).splitlines()[-1]
    assert "| 8.00 | best | 3.00 | 3.00 (2.00–4.00) | 3 | 200, 100 | 0.50, 0.50 |" in row


def test_a_run_that_was_killed_is_told_and_takes_no_part_in_ratios():
    row = table([pair(run(8.0), run(code=-9), "installed")]).splitlines()[-1]
    assert "| installed | killed (-9) | – | 1 |" in row
    row = table([pair(run(8.0), run(code=-9)), pair(run(8.0), run(4.0))]).splitlines()[-1]
    assert "| 2.00 (2.00–2.00) | 2 |" in row


def test_speed_is_the_median_of_a_tests_samples():
    assert speed({"tg8": [1.0, 9.0, 2.0], "pp4": [5.0]}, "tg8") == 2.0
    assert speed({"tg8": [1.0, 9.0, 2.0], "pp4": [5.0]}, "pp4") == 5.0
    assert speed({"code": 1}, "tg8") == 0.0


def test_a_limit_is_a_share_of_the_file_or_bytes():
    assert (memory_limit("25%", 4000), memory_limit("12345", 4000)) == (1000, 12345)


def test_time_with_a_read_under_way_counts_overlaps_once():
    assert busy_seconds([(0.0, 2.0, 1), (1.0, 3.0, 1), (5.0, 6.0, 1), (5.2, 5.4, 1)]) == pytest.approx(4.0)


def test_a_program_is_run_with_its_peak_and_killed_when_it_takes_too_long():
    done = limits.run([sys.executable, "-c", "x = bytearray(80 << 20); print('out')"], None, {}, 600)
    assert (done.code, done.out) == (0, "out\n")
    assert done.peak_rss > 80 << 20
    assert limits.run([sys.executable, "-c", "import time; time.sleep(600)"], None, {}, 0.5).code == -9


@pytest.fixture
def group():
    if not os.access(limits.CGROUP, os.W_OK) or os.geteuid() != 0:
        pytest.skip("control groups can be made by root alone")
    try:
        made = limits.MemoryGroup(64 << 20)
    except SystemExit as error:
        pytest.skip(str(error))
    yield made
    made.close()
    assert not made.path.exists()


def test_a_program_in_the_group_is_killed_above_its_limit_and_not_below(group):
    command = [sys.executable, "-c", "import sys; x = bytearray(int(sys.argv[1]) << 20)"]
    group.begin()
    assert limits.run([*command, "20"], group, {}, 600).code == 0
    assert 20 << 20 < group.peak() <= 64 << 20
    assert limits.run([*command, "100"], group, {}, 600).code == -9


def test_read_ahead_is_read_from_the_disk_that_holds_the_file(tmp_path):
    found = limits.read_ahead_bytes(Path(__file__))
    assert found == 0 or found % 1024 == 0
