"""Flags that every command line has: --version, --print-completion, and --quiet of each command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

from moe_ref import __version__

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
NO_ARGCOMPLETE = "--print-completion needs argcomplete: pip install 'moe-offload[completion]'"


class _PrintCompletion(argparse.Action):
    """Print what a shell has to read so that TAB completes this command, and end."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            import argcomplete
        except ImportError:
            parser.exit(2, f"error: {NO_ARGCOMPLETE}\n")
        print(argcomplete.shellcode([parser.prog], shell=values))
        parser.exit()


def add_common(parser: argparse.ArgumentParser) -> None:
    """To a parser whose commands are all there."""
    parser.add_argument("--version", action="version", version=f"{parser.prog} {__version__}")
    parser.add_argument("--print-completion", action=_PrintCompletion, choices=SHELLS, metavar="SHELL",
        help=f'completion for {", ".join(SHELLS)}: eval "$({parser.prog} --print-completion bash)"')  # fmt: skip
    for command in commands_of(parser):
        command.add_argument("--quiet", action="store_true", help="print the result alone, and warnings")


def commands_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all commands, those of commands within commands among them."""
    for action in parser._actions:
        for command in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            nested = list(commands_of(command))
            yield from nested or [command]


def is_completing() -> bool:
    """Whether a shell asks for completions."""
    return "_ARGCOMPLETE" in os.environ


def complete(parser: argparse.ArgumentParser) -> None:
    """Where a shell asks for completions, answer and end the process; otherwise nothing."""
    if is_completing():
        import argcomplete

        argcomplete.autocomplete(parser)
