"""What is known of each flag of llama.cpp and ik_llama.cpp: ``data/flags.toml`` by spelling."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from moe_cupy.plan.tables import table

ON_OFF = {"on": "on", "1": "on", "true": "on", "enabled": "on", "off": "off", "0": "off", "false": "off",
          "disabled": "off"}  # fmt: skip
OPTIONAL_VALUE = {"fa": ON_OFF | {"auto": "auto", "-1": "auto"}, "fit": ON_OFF}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command that runs a model says of a flag that it does not have."""

    refused: bool
    text: str  # why
    neutral: tuple[str, ...] = ()  # values with which a refused flag changes nothing


@cache
def spellings() -> dict[str, tuple[str, bool]]:
    """Flag -> (name, whether a value follows) of what is planned with."""
    flags = table("flags")
    return {s: (name, kind == "value") for kind in ("value", "switch") for name, ss in flags[kind].items() for s in ss}


@cache
def others() -> dict[str, tuple[str, bool]]:
    """Flag -> (what the planner says of it, "" if nothing, whether a value follows) of all others."""
    flags = table("flags")
    found = {flag: ("", kind == "value") for kind in ("value", "switch") for flag in flags["no_matter"][kind]}
    return found | {flag: (row["text"], row["value"]) for row in flags["told"] for flag in row["flags"]}


@cache
def answers() -> dict[str, Answer]:
    """Flag -> what is answered where a model is run; honoured ones are not among them."""
    return {
        flag: Answer(row["answer"] == "refused", row["text"], tuple(row.get("neutral", ())))
        for row in table("flags")["run"]
        for flag in row["flags"]
    }


def is_known(flag: str) -> bool:
    return flag in spellings() or flag in others()


def values_of(flag: str, words: Sequence[str]) -> int:
    """How many of the ``words`` behind a flag are its values."""
    if flag == "--control-vector-layer-range":
        return 2
    name, takes = (others() | spellings())[flag]
    accepted = OPTIONAL_VALUE.get(name) or table("flags")["optional"].get(flag)
    if accepted:
        return int(bool(words) and words[0].lower() in accepted)
    return int(takes)


def wrong_value(flag: str, value: str) -> str:
    """What llama.cpp's parser has against a value of a flag; "" where it takes it."""
    parser = table("flags")["parser"]
    if flag in parser["whole"] and not re.match(r"\s*[+-]?\d", value, re.ASCII):
        return "expected a whole number"
    if flag in parser["number"] and not re.match(r"\s*[+-]?(\.?\d|inf|nan)", value, re.ASCII | re.IGNORECASE):
        return "expected a number"
    accepted = parser["words"].get(flag)
    return f"expected one of {', '.join(accepted)}" if accepted and value not in accepted else ""


def flags_of_environment(around: Mapping[str, str]) -> Iterator[list[str]]:
    """LLAMA_ARG_* as the flags they stand for, each with its value."""
    known = table("flags")["environment"]
    for name, value in around.items():
        if name not in known:
            continue
        flag, switched = known[name], ON_OFF.get(value.lower())
        if (others() | spellings())[flag][1]:
            yield [flag, value]
        elif switched == "on":
            yield [flag]
        elif switched == "off" and is_known(f"--no-{flag[2:]}"):
            yield [f"--no-{flag[2:]}"]
