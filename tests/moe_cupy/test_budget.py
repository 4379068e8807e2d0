"""Cache sizes: every spelling is read exactly, slots never exceed the request, and a refusal names what works."""

from __future__ import annotations

import re
import sys
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_cupy.cache import BudgetError, Request, SizeClass, allot, parse_cache
from moe_cupy.device import memory

KIB, MIB, GIB = 1024, 1024**2, 1024**3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", Request(nbytes=2 * GIB)),
        ("512MiB", Request(nbytes=512 * MIB)),
        ("1.5g", Request(nbytes=3 * GIB // 2)),
        ("2 GB", Request(nbytes=2 * GIB)),  # units are powers of 1024, as in llama.cpp
        ("64k", Request(nbytes=64 * KIB)),
        ("0.5TiB", Request(nbytes=512 * GIB)),
        ("100MB", Request(nbytes=100 * MIB)),
        ("123456789", Request(nbytes=123456789)),
        ("123456789b", Request(nbytes=123456789)),
        ("0", Request(nbytes=0)),
        ("0.1KiB", Request(nbytes=102)),  # 102.4: never more than asked
        (" 2gib\n", Request(nbytes=2 * GIB)),
        ("25%", Request(share=Fraction(1, 4))),
        ("12.5%", Request(share=Fraction(1, 8))),
        ("0.1%", Request(share=Fraction(1, 1000))),  # exact: no binary fraction in between
        ("100%", Request(share=Fraction(1))),
        ("0%", Request(share=Fraction(0))),
        ("slots:48", Request(slots=48)),
        ("SLOTS:48", Request(slots=48)),
        ("slots:0", Request(slots=0)),
    ],
)
def test_spellings_are_read_exactly(text, expected):
    assert parse_cache(text) == expected


@pytest.mark.parametrize(
    "text",
    "lots||-1|-2GiB|1e9|2PiB|GiB|%|25 %%|-5%|slots|slots:|slots:-1|slots:4.5|slots:4%|25%%|1.GiB|.5g|1,5g|2GiB 1|nan"
    "|inf|0x10|auto|2GiBB|2Gi B|1..5g|¼".split("|"),
)
def test_nonsense_is_refused_with_what_is_accepted(text):
    with pytest.raises(BudgetError, match=r"expected bytes.*a share.*slots") as caught:
        parse_cache(text)
    assert repr(text.strip()) in str(caught.value), "the message must show what was typed"


@pytest.mark.parametrize("text", ["101%", "100.01%", "1000000%"])
def test_more_than_everything_is_refused(text):
    with pytest.raises(BudgetError, match=rf"{re.escape(text)}: more than all experts; use at most 100%"):
        parse_cache(text)


@given(st.one_of(st.text(max_size=12), st.from_regex(r"(slots:)?\d{1,40}(\.\d{1,40})? ?([kmgtKMGT]i?[bB]?|%)?")))
@example("٣GiB")
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_request_of_one_kind_or_a_budget_error(text):
    try:
        request = parse_cache(text)
    except BudgetError:
        return
    given_parts = [part for part in (request.nbytes, request.share, request.slots) if part is not None]
    assert len(given_parts) == 1 and given_parts[0] >= 0, request


@pytest.mark.parametrize("form", ["{}", "slots:{}", "{}%", "{}.5GiB"])
def test_a_number_of_absurd_length_is_a_budget_error_too(form):
    """Python refuses to convert more than 4300 digits, with a ValueError of its own that names no option."""
    with pytest.raises(ValueError) as caught:
        parse_cache(form.format("9" * 5000))
    assert isinstance(caught.value, BudgetError), f"{type(caught.value).__name__}: {str(caught.value)[:80]}"


# ---------------------------------------------------------------------------------------------------------
# From a request to slots

CLASSES = st.lists(
    st.builds(SizeClass, experts=st.integers(1, 40), slot_bytes=st.integers(1, 99)), min_size=1, max_size=4
)
AT_ONCE = st.integers(1, 8)


def total(classes: list[SizeClass]) -> tuple[int, int]:
    """All experts, and the bytes of a slot for each of them."""
    return sum(c.experts for c in classes), sum(c.experts * c.slot_bytes for c in classes)


def requests(classes: list[SizeClass], part: Fraction) -> list[Request]:
    """The three kinds, each asking for ``part`` of everything."""
    experts, nbytes = total(classes)
    return [
        Request(nbytes=int(part * nbytes)),
        Request(share=min(part, Fraction(1))),
        Request(slots=int(part * experts)),
    ]


def cost(request: Request, slots: list[int], classes: list[SizeClass]) -> tuple[Fraction, Fraction]:
    """(what ``slots`` take, what was asked for) in the request's own unit."""
    if request.nbytes is not None:
        return Fraction(sum(n * c.slot_bytes for n, c in zip(slots, classes, strict=True))), Fraction(request.nbytes)
    asked = request.share * total(classes)[0] if request.share is not None else Fraction(request.slots or 0)
    return Fraction(sum(slots)), asked


def try_allot(request: Request, classes: list[SizeClass], at_once: int) -> list[int] | None:
    try:
        return allot(request, classes, at_once)
    except BudgetError:
        return None


@given(CLASSES, AT_ONCE, st.fractions(0, 2))
def test_slots_fit_the_request_and_hold_one_tokens_experts(classes, at_once, part):
    for request in requests(classes, part):
        slots = try_allot(request, classes, at_once)
        minimum = [min(at_once, c.experts) for c in classes]
        if slots is None:
            took, asked = cost(request, minimum, classes)
            assert took > asked, f"{request}: refused, but {minimum} fits"
            continue
        took, asked = cost(request, slots, classes)
        assert took <= asked, f"{request}: {slots} take {took}"
        for n, low, c in zip(slots, minimum, classes, strict=True):
            assert low <= n <= c.experts, f"{request}: {slots} of {classes}"
        for i, c in enumerate(classes):
            one_more = [n + (i == j) for j, n in enumerate(slots)]
            assert slots[i] == c.experts or cost(request, one_more, classes)[0] > asked, f"{request}: room left for {i}"


@given(CLASSES, AT_ONCE, st.fractions(0, 1), st.fractions(0, 1))
def test_more_is_never_less(classes, at_once, a, b):
    """Slots of every class grow with the request; where it is in bytes (an indivisible large slot may then take
    the place of small ones), the bytes used do."""
    low, high = sorted((a, b))
    for small, large in zip(requests(classes, low), requests(classes, high), strict=True):
        less, more = try_allot(small, classes, at_once), try_allot(large, classes, at_once)
        if less is None:
            continue
        assert more is not None, f"{small} works, {large} is refused"
        if small.nbytes is None or len(classes) == 1:
            assert all(n <= m for n, m in zip(less, more, strict=True)), f"{small}: {less}, {large}: {more}"
        assert cost(small, less, classes)[0] <= cost(large, more, classes)[0], f"{small}: {less}, {large}: {more}"


@given(CLASSES, AT_ONCE, st.fractions(1, 3))
def test_everything_is_resident_at_100_percent(classes, at_once, part):
    for request in requests(classes, part):
        assert allot(request, classes, at_once) == [c.experts for c in classes], request


@given(st.integers(1, 40), st.integers(2, 4), AT_ONCE, st.fractions(0, 1))
def test_equal_classes_get_equal_slots_up_to_one(experts, n_classes, at_once, part):
    classes = [SizeClass(experts, 10)] * n_classes
    for request in requests(classes, part):
        slots = try_allot(request, classes, at_once)
        assert slots is None or max(slots) - min(slots) <= 1, f"{request}: {slots}"


def test_shares_are_filled_equally_in_a_case_worked_out_by_hand():
    """30 slots of 100: 2 each first; then the emptier by share: 15 of 50 and 15 of 50, or 24 of 80 and 6 of 20."""
    assert allot(Request(slots=30), [SizeClass(50, 7), SizeClass(50, 9)], 2) == [15, 15]
    assert allot(Request(slots=30), [SizeClass(80, 7), SizeClass(20, 9)], 2) == [24, 6]
    assert allot(Request(share=Fraction(3, 10)), [SizeClass(80, 7), SizeClass(20, 9)], 2) == [24, 6]
    # 100 bytes: 2 of 10 and 2 of 20 take 60; the rest is 10 + 20 (to 3 of 10 each), then 10 more for the small ones
    assert allot(Request(nbytes=100), [SizeClass(10, 10), SizeClass(10, 20)], 2) == [4, 3]


# ---------------------------------------------------------------------------------------------------------
# Refusals

NAMED = re.compile(r"smallest that works is (slots:(\d+)) = (\d+) bytes = ([\d.]+)% of (\d+) experts")


def named(request: Request, classes: list[SizeClass], at_once: int) -> re.Match[str]:
    with pytest.raises(BudgetError) as caught:
        allot(request, classes, at_once)
    found = NAMED.search(str(caught.value))
    assert found, f"no smallest size in: {caught.value}"
    return found


@given(
    st.lists(
        st.builds(SizeClass, experts=st.integers(1, 30000), slot_bytes=st.integers(1, 10**8)), min_size=1, max_size=4
    ),
    AT_ONCE,
    st.sampled_from([Request(nbytes=0), Request(share=Fraction(0)), Request(slots=0)]),
)
@settings(deadline=None)
def test_the_smallest_size_named_works_in_all_three_spellings_and_one_less_does_not(classes, at_once, request):
    found = named(request, classes, at_once)
    slots, count, nbytes, percent, experts = found.groups()
    minimum = [min(at_once, c.experts) for c in classes]
    assert int(experts) == total(classes)[0]
    for text in (slots, nbytes, f"{nbytes}b", f"{percent}%"):
        assert try_allot(parse_cache(text), classes, at_once) is not None, f"{text} of {found[0]!r} does not work"
    assert allot(parse_cache(slots), classes, at_once) == minimum
    step = Fraction(1, 100)  # percentages are given to two places
    less = [f"slots:{int(count) - 1}", f"{int(nbytes) - 1}"]
    if Fraction(percent) > step:
        less.append(f"{float(Fraction(percent) - step):.2f}%")
    for text in less:
        assert try_allot(parse_cache(text), classes, at_once) is None, f"{text} works, but {found[0]!r} is the smallest"


def test_a_refusal_says_what_was_asked_and_why():
    one, two = [SizeClass(12, 100)], [SizeClass(12, 100), SizeClass(4, 50)]
    with pytest.raises(BudgetError, match=r"--cache of 399 bytes is too small: one token's experts of one layer must"):
        allot(Request(nbytes=399), one, 4)
    with pytest.raises(
        BudgetError, match=r"--cache of slots:3 .*in each of the 2 slab sizes.*slots:8 = 600 bytes = 50%"
    ):
        allot(Request(slots=3), two, 4)
    with pytest.raises(BudgetError, match=r"slots:4 = 400 bytes = 33\.34% of 12 experts"):  # a third, rounded up
        allot(Request(share=Fraction(1, 4)), one, 4)


STAT = "cache 5000\ninactive_file {0}\ntotal_inactive_file {0}\n"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((None, None, 1000), (1000 - 300 + 40, 1000)),  # of the group itself
        ((None, 900, 1000), (900 - 300 + 40, 900)),  # the one above is tighter
        ((500, None, None), (500 - 300 + 40, 500)),  # only the top has one
        ((None, None, None), (sys.maxsize, sys.maxsize)),
        ((None, None, 200), (0, 200)),  # more used than allowed
    ],
)
def test_free_memory_is_what_the_tightest_control_group_leaves(tmp_path, monkeypatch, version, limits, expected):
    mount, limit_file, used_file, _ = memory.VERSIONS[version]
    folder = tmp_path / mount
    for name, limit in zip(("", "outer", "inner"), limits, strict=True):
        folder /= name
        folder.mkdir(exist_ok=True)
        unlimited = 9223372036854771712 if version == 1 else "max"  # as the kernel writes it
        (folder / limit_file).write_text(f"{unlimited if limit is None else limit}\n")
        (folder / used_file).write_text("300\n")
        (folder / "memory.stat").write_text(STAT.format(40))
    (tmp_path / "membership").write_text("9:name=systemd:/x\n4:memory:/outer/inner\n0::/outer/inner\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    free, limit = memory._control_group()
    assert (free, limit) == expected or min(free, limit, *expected) > 1 << 62
    (tmp_path / "membership").unlink()  # the top still counts
    assert memory._control_group()[1] == limits[0] if limits[0] else memory._control_group()[1] > 1 << 62
