"""Slow tests in shares: ``pytest -m slow --slow-share 3/7`` runs the third of seven parts, which together hold all.

A test's mark may say what it costs, ``@pytest.mark.slow(seconds=150)`` (of one core; once measured it need not be kept
exact): these are spread so that the parts cost about the same. All others fall by a hash of their name, so that a new
test moves no other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(values: Iterable[Any], *quick: Any, seconds: float | None = None) -> list[Any]:
    """Parameters of a test of which those that are ``quick`` run always; the others are slow and cost ``seconds``."""
    mark = pytest.mark.slow if seconds is None else pytest.mark.slow(seconds=seconds)
    values = list(values)
    missing = [value for value in quick if value not in values]
    assert not missing, f"{missing}: not among the values"
    return [pytest.param(value, marks=() if value in quick else mark) for value in values]


def parse_share(text: str) -> tuple[int, int]:
    """'3/7' as (3, 7); raises pytest.UsageError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    which, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= which <= count:
        raise pytest.UsageError(f"--slow-share {text}: expected K/N with 1 <= K <= N, as 3/7")
    return which, count


def shares_of(seconds: dict[str, float | None], count: int) -> dict[str, int]:
    """Test name -> its share from 1 to ``count``; ``seconds`` are None for tests that do not say."""
    share, load = {}, dict.fromkeys(range(1, count + 1), 0.0)
    known = {name: cost for name, cost in seconds.items() if cost is not None}
    for name in sorted(known, key=lambda name: (-known[name], name)):
        share[name] = min(load, key=load.__getitem__)
        load[share[name]] += known[name]
    for name in seconds.keys() - known.keys():
        share[name] = int(hashlib.sha256(name.encode()).hexdigest(), 16) % count + 1
    return share


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option of this module."""
    parser.addoption("--slow-share", metavar="K/N", help="of the slow tests only the K-th of N parts")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the slow tests of the other shares."""
    option = config.getoption("slow_share")
    if option is None:
        return
    which, count = parse_share(option)
    marks = {item.nodeid: mark for item in items if (mark := item.get_closest_marker("slow"))}
    share = shares_of({name: mark.kwargs.get("seconds") for name, mark in marks.items()}, count)
    others = [item for item in items if share.get(item.nodeid, which) != which]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if share.get(item.nodeid, which) == which]
