"""How an error calls an option: as Python does, ``cache='25%'``, or as the command line does, ``--cache 25%``.

What is raised below the engine spells options as flags, which no other word of a message looks like. ``python_names``
turns them into Python's names where an engine is made; the command line opens its engines under ``flags``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

SAME = """cache host_cache policy prefetch device threads ctx_size ubatch_size reads_in_flight cache_type_k cache_type_v
store act decode"""
NAMES = {
    "-c": "ctx_size", "-ub": "ubatch_size", "-t": "threads", "-ctk": "cache_type_k", "-ctv": "cache_type_v",
    "-ngl": "n_gpu_layers", "-ot": "overrides", "--reads": "reads_in_flight", "--no-direct-io": "direct_io",
    **{f"--{name.replace('_', '-')}": name for name in SAME.split()},
}  # fmt: skip
# A flag, and its value where it ends there: "--decode device, where" but not "--cache of 3 bytes".
VALUE = r"(?: (?!(?:or|and|to)\b)('[^']*'|[^\s:;,]+)(?=[:;,]| -|$))?"
FLAG = re.compile(rf"(?<![\w-])({'|'.join(sorted(NAMES, key=len, reverse=True))})(?![\w-]){VALUE}")
LITERAL = re.compile(r"'[^']*'|True|False|None|nan|-?inf|-?\d+(\.\d+)?(e[+-]?\d+)?")
_flags: ContextVar[bool] = ContextVar("flags", default=False)


@contextmanager
def flags() -> Iterator[None]:
    """Meanwhile, errors spell options as the command line does."""
    before = _flags.set(True)
    try:
        yield
    finally:
        _flags.reset(before)


@contextmanager
def python_names() -> Iterator[None]:
    """Errors that leave spell options as Python does, unless under ``flags``."""
    try:
        yield
    except (ValueError, RuntimeError, MemoryError) as error:
        if not _flags.get() and error.args == (str(error),):
            error.args = (in_python(str(error)),)
        raise


def in_python(message: str) -> str:
    """``message`` with every flag as the argument of ``Engine`` that it is."""

    def renamed(found: re.Match[str]) -> str:
        name, value = NAMES[found[1]], found[2]
        if value is None:
            return name
        return f"{name}={value if LITERAL.fullmatch(value) else repr(value)}"

    return FLAG.sub(renamed, message)
