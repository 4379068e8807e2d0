"""Every slow test is in exactly one share, and those that say what they cost are spread."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.slow_shares import mostly_slow, parse_share, pytest_collection_modifyitems, shares_of


def test_the_parts_cost_about_the_same_whatever_the_order_of_the_tests():
    seconds = {f"dear {i}": float(s) for i, s in enumerate([300, 200, 200, 100, 100, 100, 90, 60, 40, 10])}
    share = shares_of(seconds, 3)
    loads = Counter(dict.fromkeys((1, 2, 3), 0.0))
    for name, cost in seconds.items():
        loads[share[name]] += cost
    assert sorted(loads.values()) == [400, 400, 400]
    assert shares_of(dict(reversed(seconds.items())), 3) == share


def test_a_new_test_that_names_no_cost_moves_no_other():
    before = shares_of({f"test {i}": None for i in range(700)}, 7)
    after = shares_of({f"test {i}": None for i in range(701)}, 7)
    assert before.items() < after.items()
    sizes = Counter(before.values())
    assert set(sizes) == set(range(1, 8)) and max(sizes.values()) < 150


@pytest.mark.parametrize("text", ["", "3", "0/7", "8/7", "1/0", "-1/7", "a/b", "1/7/7", "1.5/7"])
def test_a_share_that_is_none_is_refused(text):
    with pytest.raises(pytest.UsageError, match=f"--slow-share {text}: expected K/N"):
        parse_share(text)


def selected(option: str | None, marks: dict[str, pytest.Mark | None]) -> set[str]:
    """Names of the tests that are left of those marked so."""
    items: list[Any] = [SimpleNamespace(nodeid=n, get_closest_marker=lambda _, m=m: m) for n, m in marks.items()]
    gone: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))
    pytest_collection_modifyitems(cast(pytest.Config, SimpleNamespace(getoption=lambda _: option, hook=hook)), items)
    left = {item.nodeid for item in items}
    assert {item.nodeid for item in gone} == marks.keys() - left
    return left


def test_the_shares_of_a_suite_together_are_its_slow_tests(request):
    slow = {f"slow {i}": pytest.mark.slow.mark for i in range(20)} | {"dear": pytest.mark.slow(seconds=60).mark}
    parts = [selected(f"{k}/3", slow | {"quick": None}) for k in (1, 2, 3)]
    assert all("quick" in part and len(part) > 3 for part in parts)
    assert sum(len(part - {"quick"}) for part in parts) == len(slow) and set().union(*parts) == {*slow, "quick"}
    assert selected(None, slow) == slow.keys()
    assert request.config.getoption("slow_share", "no such option") != "no such option"


def test_all_values_but_the_quick_ones_are_slow():
    rows = mostly_slow("abc", "b", seconds=7)
    assert [(row.values[0], [mark.kwargs for mark in row.marks]) for row in rows] == [
        ("a", [{"seconds": 7}]), ("b", []), ("c", [{"seconds": 7}]),
    ]  # fmt: skip
    with pytest.raises(AssertionError, match=r"'z'.*not among the values"):
        mostly_slow("abc", "z")
