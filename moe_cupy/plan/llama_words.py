"""A command line as people post it, in words: quotes, line ends, what stands before the program and after the flags."""

from __future__ import annotations

import re
import shlex

from moe_cupy.plan.tables import PlanError

CONTINUED = re.compile(r"[\\`^][ \t]*\r?\n")
COMMENT = re.compile(r"^[ \t]*(#|//|REM\b).*$", re.MULTILINE)
LOOKS_WINDOWS = re.compile(r"\.exe\b|[A-Za-z]:\\|\$env:|[`^][ \t]*\r?\n", re.IGNORECASE)
PROGRAM = re.compile(r"(.*[/\\])?(llama-[a-z0-9-]+|llama|main|server)(\.exe)?|.*llama\.?cpp[^ ]*:.+", re.IGNORECASE)
ENDS = ("|", "||", "&&", ";", "&", ">", ">>", "<", "2>", "2>&1", "&>")  # what comes then is another command, or a file
ENVIRONMENT = re.compile(r"(?:\$env:)?([A-Za-z_]\w*)=(.*?);?", re.DOTALL)
TYPED = {"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "\u00a0": " "}  # what word processors and forums make of it


def split_words(text: str) -> list[str]:
    """Words of a POSIX or Windows line, continued lines joined. Raises PlanError for a quote that is not closed."""
    for wrong, right in TYPED.items():
        text = text.replace(wrong, right)
    looks_windows = LOOKS_WINDOWS.search(text) is not None
    text = CONTINUED.sub(" ", COMMENT.sub("", text))
    try:
        lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
        lexer.whitespace_split, lexer.commenters = True, ""
        if looks_windows:
            lexer.escape = ""
        return [re.sub(r"^[–—](?=\w)", "-", word) for word in lexer]
    except ValueError as error:
        raise PlanError(f"--from-command: {error}; check its quotes") from error


def program_and_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the flags (the program, another that starts it, what the environment is), and the flags."""
    named = next((i + 1 for i, word in enumerate(words) if PROGRAM.fullmatch(word) and "=" not in word), 0)
    start = next((i for i in range(named, len(words)) if words[i].startswith("-")), len(words))
    end = next((i for i in range(start, len(words)) if words[i] in ENDS), len(words))
    return words[:start], words[start:end]


def another_program(before: list[str]) -> list[str]:
    """A remark where the line starts a program that is none of theirs; [] for flags alone."""
    words = [word for word in before if word not in ("set", "export", "sudo") and not ENVIRONMENT.fullmatch(word)]
    if not words or any(PROGRAM.fullmatch(word) for word in words):
        return []
    return [f"{words[0][:60]}: no program of llama.cpp or ik_llama.cpp; its flags are read as if it were"]


def environment(before: list[str]) -> dict[str, str]:
    """NAME=value words, with ``set``, ``export`` or ``$env:`` or without."""
    found = (ENVIRONMENT.fullmatch(word) for word in before)
    return {match[1]: match[2].strip("\"'") for match in found if match}
