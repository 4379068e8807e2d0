"""The command line of whatever runs a model: what is written for llama.cpp works here, or is answered by its name.

Each of its flags is honoured, taken with one line why it has no effect, or refused with the reason
(``plan/data/flags.toml``); none is ever read as another.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from moe_ref.parser import Parser, nearest

ZERO_OR_ONE = re.compile(r"[01](,[01])*")  # llama-bench gives one to every switch
OTHERS = "Other flags of llama.cpp and ik_llama.cpp are taken with a line why they have no effect, or refused by name."


class CommandParser(Parser):
    """A command of this program: a flag of llama.cpp that it does not have is refused as one."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_argument("--usage", action="help", help=argparse.SUPPRESS)  # llama.cpp's third name of --help

    def foreign(self, flag: str, words: Sequence[str], i: int) -> tuple[list[str], int]:
        from moe_cupy.plan.flag_table import answers, is_known, others, spellings

        if not is_known(flag):
            near = nearest(flag, self._option_string_actions) or nearest(flag, [*others(), *spellings()])
            self.error(f"{flag}: there is no such flag{near}")
        answer = answers().get(flag)
        why = f": {answer.text}" if answer and answer.refused else ""
        why = ": --from-command explains a whole line" if "--from-command" in self._option_string_actions else why
        self.error(f"{flag}: {self.prog} does not have this flag of llama.cpp{why}")


class EngineParser(CommandParser):
    """Knows all flags of llama.cpp and ik_llama.cpp; ``remarks`` of the result says which have no effect.

    LLAMA_ARG_* of the environment are read as flags in front of the others, as programs of llama.cpp do.
    """

    environment = True
    gives_switches_values = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, epilog=OTHERS, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        self._without_effect: dict[str, list[str]] = {}  # why -> flags
        words = list(sys.argv[1:] if args is None else args)
        self._around = self._from_environment(os.environ) if self.environment else []
        model = next((flag[1] for flag in self._around if flag[0] == "-m"), None)
        around = [word for flag in self._around if flag[0] != "-m" for word in flag]
        namespace, rest = super().parse_known_args([*around, *words], namespace)
        namespace.model = namespace.model or model
        namespace.remarks = [f"from the environment: {' '.join(map(' '.join, self._around))}"] * bool(self._around)
        namespace.remarks += [f"{', '.join(dict.fromkeys(flags))}: no effect here: {why}"
                              for why, flags in self._without_effect.items()]  # fmt: skip
        return namespace, rest

    def _from_environment(self, around: Mapping[str, str]) -> list[list[str]]:
        if not any(name.startswith("LLAMA_ARG_") for name in around):
            return []
        from moe_cupy.plan.flag_table import flags_of_environment

        return list(flags_of_environment({name: value for name, value in around.items() if value}))

    def foreign(self, flag: str, words: Sequence[str], i: int) -> tuple[list[str], int]:
        from moe_cupy.plan.flag_table import answers

        answer = answers().get(flag)
        if answer is None:
            return super().foreign(flag, words, i)
        values, after = self._values(flag, words, i)
        if not answer.refused:
            self._without_effect.setdefault(answer.text, []).append(flag)
        elif any(_is_same(value, neutral) for value in values for neutral in answer.neutral):
            self._without_effect.setdefault("that is how it is here", []).append(" ".join([flag, *values]))
        else:
            taken = f"; {flag} {answer.neutral[0]} is taken" if answer.neutral else ""
            self.error(f"{' '.join([flag, *values])[:80]}: {answer.text}{taken}")
        return [], after

    def _values(self, flag: str, words: Sequence[str], i: int) -> tuple[list[str], int]:
        """The values of the known flag at ``words[i]``, and where the next word begins."""
        from moe_cupy.plan.flag_table import table, values_of, wrong_value

        _, equals, value = words[i].partition("=")
        behind = [value] if equals else list(words[i + 1 :])
        count = values_of(flag, behind)
        if not count and behind and (equals or self._is_a_value(flag, behind[0], table("flags")["parser"]["words"])):
            count = 1
        if count > len(behind):
            self.error(f"{flag}: expected a value behind it")
        if count == 1 and not self.gives_switches_values and (wrong := wrong_value(flag, behind[0])):
            self.error(f"{flag} {behind[0][:40]}: {wrong}")
        return behind[:count], i + 1 + (0 if equals else count)

    def _is_a_value(self, flag: str, word: str, with_words: Mapping[str, Any]) -> bool:
        """Whether the word behind a flag that need not have a value is one: no flag, and no other argument."""
        if self.gives_switches_values:
            return ZERO_OR_ONE.fullmatch(word) is not None
        return flag in with_words and not word.startswith("-")

    def error(self, message: str) -> NoReturn:
        around = getattr(self, "_around", [])
        said = f" (flags of the environment, LLAMA_ARG_*: {' '.join(map(' '.join, around))})" if around else ""
        super().error(message + said)


class BenchParser(EngineParser):
    """As llama-bench: the environment is not read, and switches have values."""

    environment = False
    gives_switches_values = True


def _is_same(value: str, other: str) -> bool:
    """As numbers, where both are."""
    try:
        return float(value) == float(other)
    except ValueError:
        return value == other
