"""The table of verdicts names what failed, in whichever way it was started."""

from __future__ import annotations

import re
import sys

import pytest

from benchmarks import flakiness

SAYS = "print('FAILED tests/a.py::test_b[c d] - assert 0\\n1 failed'); raise SystemExit(1)"
STATE = (
    "import os, signal, sys; ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN\n"
    "try: os.fstat(0); closed = False\nexcept OSError: closed = True\n"
    "print(ignored, closed, os.getsid(0) == os.getpid())"
)


def test_a_run_that_fails_is_counted_and_its_tests_are_named(capsys):
    words = ["--runs", "2", "--busy", "1", "--ways", "usual", "--", sys.executable, "-c", SAYS]
    assert flakiness.main(words) == 1
    said = capsys.readouterr().out
    assert re.search(r"^\| 2 \| usual \| 1 \| [\d.]+ \| 1 failed \| tests/a.py::test_b\[c d\] \|$", said, re.MULTILINE)
    assert "2 runs beside 1 busy loop, 2 failed\n2 of 2: tests/a.py::test_b[c d]\n" in said


def test_runs_are_started_in_each_way_and_two_count_as_two():
    said = {way: flakiness.verdicts([sys.executable, "-c", STATE], way) for way in flakiness.WAYS}
    assert [len(runs) for runs in said.values()] == [1, 1, 1, 1, 2]
    ignored, closed, own_session = (
        {way for way, (one, *_) in said.items() if one.last.split()[i] == "True"} for i in range(3)
    )
    assert (closed, own_session) == ({"closed-input"}, {"no-terminal"}) and "no-interrupts" in ignored


def test_a_way_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        flakiness.main(["--ways", "usual,upside-down"])
    assert "'upside-down' is none of usual," in capsys.readouterr().err
