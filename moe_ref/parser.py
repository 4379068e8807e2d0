"""Command lines whose flags are whole words: none is split, none guessed from its beginning."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from moe_ref.common_flags import is_completing


class HelpFormatter(argparse.HelpFormatter):
    """Flags in the order of their groups, each with its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.default not in (None, "", argparse.SUPPRESS) and not isinstance(action.default, bool | list)
        return f"{text} (default: %(default)s)" if shown and "default" not in text else text

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """All spellings, and the value once."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class Parser(argparse.ArgumentParser):
    """A flag is one of the known spellings, the word behind it is its value even if that begins with a dash.

    What argparse would do instead: read ``-fa on`` as ``-f a``, ``--pre`` as ``--prefetch``, refuse ``-p -text`` and
    a positional argument behind the flags. ``--flag=value`` and, as llama.cpp has it, ``--long_flag`` are taken too.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"allow_abbrev": False, "formatter_class": HelpFormatter})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self.whole_words(words), namespace)

    def whole_words(self, words: Sequence[str]) -> list[str]:
        """The same command line such that argparse has nothing to guess: positional words, then ``flag=value``."""
        positional: list[str] = []
        flags: list[str] = []
        i = 0
        while i < len(words):
            if words[i] == "--":
                return positional + flags + list(words[i:])
            if not re.match(r"-.", words[i]):
                if self._subparsers:  # the command: what follows is read by its own parser
                    return flags + list(words[i:])
                positional.append(words[i])
                i += 1
                continue
            taken, i = self.take(words, i)
            flags += taken
        return positional + flags

    def take(self, words: Sequence[str], i: int) -> tuple[list[str], int]:
        """The flag at ``words[i]`` with its values, as argparse reads it safely, and where the next word begins."""
        flag, equals, value = self.spelled(words[i]).partition("=")
        action = self._option_string_actions.get(flag)
        if action is None:
            return self.foreign(flag, words, i)
        if equals or action.nargs == 0:
            return [flag + equals + value], i + 1
        if action.nargs is not None:  # several values: up to the next flag
            end = next((j for j in range(i + 1, len(words)) if re.match(r"-\D", words[j])), len(words))
            return [flag, *words[i + 1 : end]], end
        if i + 1 == len(words):
            if is_completing():  # the shell asks for the values that are possible
                return [flag], i + 1
            self.error(f"{flag}: expected a value behind it")
        return [f"{flag}={words[i + 1]}"], i + 2

    def spelled(self, word: str) -> str:
        """A long flag with dashes, also where it was written with underscores."""
        flag, equals, value = word.partition("=")
        return (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value

    def foreign(self, flag: str, words: Sequence[str], i: int) -> tuple[list[str], int]:
        """What to do with a flag that this command does not have: refuse it by its name."""
        self.error(f"{flag}: there is no such flag{nearest(flag, self._option_string_actions)}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if not action.option_strings or arg_strings != ["--"]:
            return super()._get_values(action, arg_strings)  # type: ignore[misc]
        value = self._get_value(action, "--")  # type: ignore[attr-defined]  # argparse would drop it
        self._check_value(action, value)  # type: ignore[attr-defined]
        return value

    def format_help(self) -> str:
        self.usage = self.usage or self.short_usage()
        return super().format_help()

    def short_usage(self) -> str:
        """What has to be given, in one line."""
        groups = [group for group in self._mutually_exclusive_groups if group.required]
        grouped = {id(action) for group in groups for action in group._group_actions}
        words = [self.prog]
        for action in self._actions:
            if not action.option_strings:
                words.append(str(action.metavar or action.dest.upper()))
            elif action.required and id(action) not in grouped:
                words.append(_with_value(action))
        words += [f"({' | '.join(map(_with_value, group._group_actions))})" for group in groups]
        return " ".join([*words, "[FLAGS]"]).replace("%", "%%")

    def error(self, message: str) -> NoReturn:
        """One line of usage, one with the mistake; exit code 2."""
        usage = (self.usage or self.short_usage()).replace("%%", "%")
        self.exit(2, f"usage: {usage}; all flags: {self.prog} --help\nerror: {message}\n")


def _with_value(action: argparse.Action) -> str:
    return f"{action.option_strings[0]} {action.metavar or action.dest.upper()}"


def nearest(flag: str, known: Iterable[str]) -> str:
    """``; did you mean …?`` for the known spelling that is nearest to ``flag``, or nothing."""
    names = list(known)
    glued = re.fullmatch(r"(-[A-Za-z]+)(\d.*)", flag)
    if glued and glued[1] in names:
        return f"; a value stands apart: {glued[1]} {glued[2]}"
    close = difflib.get_close_matches(flag, names, 1, 0.6) if len(flag) > 3 else []  # of -fa anything is near
    return f"; did you mean {close[0]}?" if close else ""
