"""From what a person asks (2GiB, 25%, slots:48) to how many slots each size class gets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 40  # characters of a size that a person might type
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


class BudgetError(ValueError):
    """A cache size that cannot be read, or one too small to run; names the smallest that works."""


@dataclass(frozen=True, slots=True)
class SizeClass:
    """Experts whose slabs have the same size: ``experts`` of them in all, ``slot_bytes`` each."""

    experts: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class Request:
    """A parsed ``--cache``: exactly one of the three is set."""

    nbytes: int | None = None
    share: Fraction | None = None
    slots: int | None = None


def parse_cache(text: str, flag: str = "--cache") -> Request:
    """Read ``2GiB`` (units are powers of 1024), ``25%`` or ``slots:48``. Raises BudgetError, which names ``flag``."""
    text = text.strip()
    if len(text) > LONGEST:
        raise BudgetError(f"{flag} {text[:LONGEST]}…: {len(text)} characters are no size")
    if match := re.fullmatch(r"slots:(\d+)", text, re.IGNORECASE):
        return Request(slots=int(match[1]))
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        share = Fraction(match[1]) / 100
        if share > 1:
            raise BudgetError(f"{flag} {text}: more than all experts; use at most 100%")
        return Request(share=share)
    if match := _BYTES.fullmatch(text):
        return Request(nbytes=int(Fraction(match[1]) * _UNITS[match[2].lower()]))
    raise BudgetError(f"{flag} {text!r}: expected bytes (2GiB, 512MiB), a share (25%) or slots (slots:48)")


def allot(request: Request, classes: Sequence[SizeClass], at_once: int, flag: str = "--cache") -> list[int]:
    """Slots of each class: at least ``at_once`` (a token's experts of one layer), then equal shares filled.

    Raises BudgetError if even the minimum does not fit, naming ``flag`` and the smallest request that does.
    """
    slots = [min(at_once, c.experts) for c in classes]
    price = [c.slot_bytes if request.nbytes is not None else 1 for c in classes]
    left = _limit(request, classes) - sum(n * p for n, p in zip(slots, price, strict=True))
    if left < 0:
        raise BudgetError(f"{flag} of {_too_small(request, classes, slots)}")
    while True:
        open_classes = [i for i, c in enumerate(classes) if slots[i] < c.experts and price[i] <= left]
        if not open_classes:
            return slots
        emptiest = min(open_classes, key=lambda i: Fraction(slots[i], classes[i].experts))
        slots[emptiest] += 1
        left -= price[emptiest]


def _limit(request: Request, classes: Sequence[SizeClass]) -> int:
    if request.nbytes is not None:
        return request.nbytes
    if request.share is not None:
        return int(request.share * sum(c.experts for c in classes))
    return request.slots or 0


def _too_small(request: Request, classes: Sequence[SizeClass], slots: Sequence[int]) -> str:
    count, total = sum(slots), sum(c.experts for c in classes)
    nbytes = sum(n * c.slot_bytes for n, c in zip(slots, classes, strict=True))
    asked = f"{request.nbytes} bytes" if request.nbytes is not None else f"slots:{_limit(request, classes)}"
    percent = -(-count * 10000 // total) / 100  # rounded up, so that it works when typed back
    why = "one token's experts of one layer" + (
        f" in each of the {len(classes)} slab sizes of this file" if len(classes) > 1 else ""
    )
    return (
        f"{asked} is too small: {why} must be resident together; "
        f"the smallest that works is slots:{count} = {nbytes} bytes = {percent:g}% of {total} experts"
    )
