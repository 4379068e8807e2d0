"""Patterns of ``-ot`` as llama.cpp reads them: ECMAScript as libstdc++'s ``std::regex`` knows it, in Python's terms.

The two dialects differ where a pattern is refused by one of them or means something else: ``(?i)``, ``(?<n>…)``,
look-behind and possessive quantifiers exist in Python alone, ``[[:digit:]]`` and stacked quantifiers in C++ alone.
"""

from __future__ import annotations

import re
from functools import lru_cache

CLASSES = {
    "alnum": "a-zA-Z0-9", "alpha": "a-zA-Z", "blank": " \\t", "cntrl": "\\x00-\\x1f\\x7f", "digit": "0-9",
    "graph": "\\x21-\\x7e", "lower": "a-z", "print": "\\x20-\\x7e", "punct": "\\x21-\\x2f:-@\\x5b-`{-~",
    "space": "\\s", "upper": "A-Z", "xdigit": "0-9a-fA-F", "d": "0-9", "s": "\\s", "w": "a-zA-Z0-9_",
}  # fmt: skip
SIMPLE_ESCAPES = "dDwWsSbBfnrtv0"
HEX_ESCAPES = {"x": 2, "u": 4}


class PatternError(ValueError):
    """A pattern that ``std::regex`` refuses."""


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """``pattern`` for ``search`` in tensor names. Raises PatternError saying what is wrong with it."""
    try:
        return re.compile(_Reader(pattern).read(), re.ASCII)
    except (re.error, OverflowError) as error:
        raise PatternError(str(error)) from error
    except RecursionError:
        raise PatternError("its groups are nested too deep") from None


class _Reader:
    """One pass over a pattern; ``out`` holds what is written, ``atom`` where its last part that can repeat begins."""

    def __init__(self, pattern: str):
        self.text, self.at, self.out = pattern, 0, [""]
        self.atom: int | None = None
        self.open: list[tuple[int, bool]] = []  # where each group begins in out, and whether it can repeat

    def read(self) -> str:
        while self.at < len(self.text):
            self._step(self.text[self.at])
        if self.open:
            raise PatternError("a group is not closed: ')' is missing")
        return "".join(self.out)

    def _step(self, char: str) -> None:
        if char in "*+?" or char == "{":
            self._quantifier(char)
        elif char == "(":
            self._group()
        elif char == ")":
            self._close()
        elif char == "[":
            self._put(self._brackets())
        elif char == "\\":
            self._put(*self._escape())
        elif char in "^$|":
            self._put(char, 1, repeats=False)
        else:
            self._put("." if char == "." else re.escape(char), 1)

    def _put(self, written: str, length: int = 0, repeats: bool = True) -> None:
        self.atom = len(self.out) if repeats else None
        self.out.append(written)
        self.at += length

    def _quantifier(self, char: str) -> None:
        match = re.compile(r"\{\d+(,\d*)?\}|[*+?]").match(self.text, self.at)
        if match is None:
            raise PatternError(
                f"{self.text[self.at :][:8]!r} is no quantifier such as {{2}} ('{{' alone is written \\{{)"
            )
        if self.atom is None:
            raise PatternError(f"nothing to repeat before {match[0]!r} at character {self.at + 1}")
        self.at = match.end()
        lazy = self.text[self.at : self.at + 1] == "?"
        self.at += lazy
        self.out[self.atom :] = [f"(?:{''.join(self.out[self.atom :])}){match[0]}{'?' * lazy}"]

    def _group(self) -> None:
        special = re.compile(r"\(\?(.?)").match(self.text, self.at)
        kind = special[1] if special else ""
        if special and kind not in (":", "=", "!"):
            raise PatternError(f"{self.text[self.at :][:4]!r} is not known: groups are (…), (?:…), (?=…) and (?!…)")
        self.open.append((len(self.out), kind not in ("=", "!")))
        self._put(f"(?{kind}" if special else "(", 2 + len(kind) if special else 1, repeats=False)

    def _close(self) -> None:
        if not self.open:
            raise PatternError(f"')' at character {self.at + 1} closes nothing")
        begin, repeats = self.open.pop()
        self.out[begin:] = ["".join(self.out[begin:]) + ")"]
        self.atom = begin if repeats else None
        self.at += 1

    def _escape(self) -> tuple[str, int, bool]:
        char = self.text[self.at + 1 : self.at + 2]
        if not char:
            raise PatternError("a backslash ends the pattern")
        if char in HEX_ESCAPES:
            digits = self.text[self.at + 2 : self.at + 2 + HEX_ESCAPES[char]]
            if not re.fullmatch(f"[0-9a-fA-F]{{{HEX_ESCAPES[char]}}}", digits):
                raise PatternError(f"\\{char} needs {HEX_ESCAPES[char]} hexadecimal digits")
            return re.escape(chr(int(digits, 16))), 2 + len(digits), True
        if char.isdigit() and char != "0":
            number = re.compile(r"\d+").match(self.text, self.at + 1)
            assert number is not None
            return f"(?:\\{number[0]})", 1 + len(number[0]), True
        if char == "0":
            return "\\x00", 2, True
        return (f"\\{char}" if char in SIMPLE_ESCAPES else re.escape(char)), 2, char not in "bB"  # \\Z is a Z

    def _brackets(self) -> str:
        """A bracket expression; leaves ``at`` behind it."""
        begin = self.at + 1
        negated = self.text[begin : begin + 1] == "^"
        at, parts = begin + negated, []
        while self.text[at : at + 1] != "]":
            part = re.compile(r"\[:(\w*):\]|\\(.)|(.)").match(self.text, at)
            if part is None:
                raise PatternError("a bracket is not closed: ']' is missing")
            at = part.end()
            parts.append(self._bracket_part(part))
        self.at = at + 1
        if not parts:
            return "[\\x00-\\U0010ffff]" if negated else "(?!)"
        return f"[{'^' * negated}{''.join(parts)}]"

    def _bracket_part(self, part: re.Match[str]) -> str:
        if part[3]:
            return part[3] if part[3] == "-" else re.escape(part[3])
        if part[2]:
            return f"\\{part[2]}" if part[2] in SIMPLE_ESCAPES else re.escape(part[2])
        if part[1] not in CLASSES:
            raise PatternError(f"[:{part[1]}:] is no class; classes: {', '.join(CLASSES)}")
        return CLASSES[part[1]]
