"""What llama.cpp's own parser refuses of a line, in sentences; the line is planned as it was meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from moe_cupy.plan.flag_table import is_known, wrong_value
from moe_cupy.plan.tables import table

VERSION = "llama.cpp 0.5.0-dev"
Word = tuple[str, str, str]  # as it was written, the flag, its value


def refusals(words: Sequence[Word], bench: bool) -> Iterator[str]:
    """A sentence for each flag for which no program of llama.cpp starts; ``bench``: llama-bench, which takes lists."""
    for written, flag, value in words:
        if "=" in written and written != flag and is_known(flag):
            yield f"{written}: a flag and its value are two words there: {flag} {value}"
        elif bench:
            continue
        elif flag in ("-ot", "--override-tensor") and re.search(r"=[A-Za-z]+\d*(_Host)?;.", value):
            yield f"{flag} {value}: rules are parted by commas, as {value.replace(';', ',')}"
        elif wrong := wrong_value(flag, value):
            yield f"{flag} {value[:40]}: {wrong}"


def older(words: Sequence[Word]) -> Iterator[str]:
    """A remark on each flag that older builds take, and ik_llama.cpp, and llama.cpp does not any more."""
    now = table("flags")["parser"]["older"]
    for flag in dict.fromkeys(flag for _, flag, _ in words):
        if flag in now:
            yield f"{flag}: {VERSION} refuses it (older builds and ik_llama.cpp take it); it is {now[flag]} now"
