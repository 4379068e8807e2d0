"""What the scripts run, in which order, and what they say and return where a part of it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUB = 'echo "$(basename "$0") $*" >>ran\ncase " $FAILING " in *" $(basename "$0") $* "*) exit 9 ;; esac\n'


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of .ci/run and scripts/test.sh in a folder with blanks; what they call writes its name to a file."""
    tree = tmp_path / "a tree with blanks"
    for folder in ("scripts", ".ci", ".venv/bin"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tree / ".ci")
    for name in ("cuda_gates.sh", "test.sh", "bootstrap.sh"):
        (tree / "scripts" / name).write_text(STUB)
    (tree / "Makefile").write_text("test:\n\t@sh scripts/test.sh\n")
    program(tree / ".venv" / "bin" / "python", STUB)
    program(tree / ".venv" / "bin" / "apt-get", "exit 0\n")  # nothing is installed by a test
    return tree


def run(tree: Path, *command: str, failing: str = "", **environment: str) -> tuple[int, list[str], str]:
    """Exit code, what ran, and what was said."""
    (tree / "ran").unlink(missing_ok=True)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "CI_"))}
    env |= {"FAILING": failing, "PYTHON": "true", "PATH": f"{tree}/.venv/bin:{os.environ['PATH']}"} | environment
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    return done.returncode, (tree / "ran").read_text().splitlines(), done.stdout + done.stderr


def test_ci_runs_the_gates_a_share_that_it_names_and_make_test_last(tree):
    code, ran, said = run(tree, "bash", ".ci/run", CI_SLOW_SHARE="3/7")
    assert (code, ran) == (0, ["cuda_gates.sh ", "test.sh --share 3/7", "test.sh "])
    assert "again: sh scripts/test.sh --share 3/7" in said


def test_the_share_of_a_day_is_one_of_seven(tree):
    program(tree / ".venv" / "bin" / "date", '[ "$*" = "-u +%u" ] && echo "$DAY"\n')
    days = [run(tree, "bash", ".ci/run", DAY=str(day))[1][1] for day in range(1, 8)]
    assert days == [f"test.sh --share {k}/7" for k in range(1, 8)]


@pytest.mark.parametrize("failing", ["cuda_gates.sh ", "test.sh --share 3/7", "test.sh "])
def test_a_part_of_ci_that_fails_is_named_and_the_others_run(tree, failing):
    code, ran, said = run(tree, "bash", ".ci/run", failing=failing, CI_SLOW_SHARE="3/7")
    assert code == 1 and len(ran) == 3
    assert said.splitlines()[-1].startswith("ci: failed: ") and said.count("ci: failed: ") == 1


def options(line: str) -> str:
    """What pytest was told to select, of a line that the stand-in for Python wrote."""
    return line.partition("-m pytest ")[2].partition("--no-loadscope-reorder ")[2]


def test_make_test_checks_form_and_types_then_runs_tests_and_notebooks_in_one_pytest(tree):
    shutil.copy(ROOT / "scripts" / "test.sh", tree / "scripts")
    code, ran, _ = run(tree, "sh", "scripts/test.sh")
    assert code == 0
    assert [line.split()[:3] for line in ran] == [["bootstrap.sh", "dev"]] + [
        ["python", "-m", tool] for tool in ("ruff", "ruff", "mypy", "pytest")
    ]
    assert options(ran[-1]).startswith("-m not slow ") and options(ran[-1]).endswith(" tests")
    _, ran, _ = run(tree, "sh", "scripts/test.sh", "--all")
    assert options(ran[-1]).startswith("-m slow or not slow ") and options(ran[-1]).endswith(" tests")
    _, ran, _ = run(tree, "sh", "scripts/test.sh", "--share", "2/7")
    assert [options(line) for line in ran[1:]] == ["-m slow --slow-share 2/7 tests"]


def test_a_step_that_fails_ends_make_test_and_is_named(tree):
    shutil.copy(ROOT / "scripts" / "test.sh", tree / "scripts")
    code, ran, said = run(tree, "sh", "scripts/test.sh", failing="python -m mypy moe_ref moe_cupy")
    assert code == 9 and ran[-1] == "python -m mypy moe_ref moe_cupy"
    assert said.splitlines()[-1] == "stopped: mypy failed (exit status 9)"


@pytest.mark.parametrize("words", [["--al"], ["--share"], ["--lint", "x"], ["tests"]])
def test_a_flag_that_is_none_is_refused(words):
    done = subprocess.run(["sh", "scripts/test.sh", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is none of --all, --share K/N, --lint" in done.stderr
