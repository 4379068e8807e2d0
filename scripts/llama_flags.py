"""The flags of llama.cpp out of its sources, for tests/data/llama_flags.json: python scripts/llama_flags.py LLAMA_CPP.

LLAMA_CPP is a source tree, such as vendor/llama.cpp of the sdist of llama-cpp-python. One line per option: spellings,
spellings that negate it, what its handler takes (void, bool, int, str, str_str; "removed" refuses), its variable of the
environment.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

OPTION = re.compile(r"common_arg\(\s*\{([^}]*)\}\s*,\s*(?:\{([^}]*)\}\s*,)?")
HANDLER = re.compile(r"\[[^\[\]]*\]\(([^()]*)\)\s*(?:->[^{]*)?\{")
KINDS = {"string": "str", "int": "int", "bool": "bool"}


def strings(text: str | None) -> list[str]:
    return re.findall(r'"([^"]*)"', text or "")


def options(source: str) -> Iterator[tuple[list[str], list[str], str, str | None]]:
    """(spellings, negated spellings, kind, environment) of each option of common/arg.cpp."""
    begins = [m for m in OPTION.finditer(source) if strings(m[1]) and strings(m[1])[0].startswith("-")]
    for begin, after in zip(begins, [*begins[1:], None], strict=True):
        text = source[begin.end() : after.start() if after else len(source)]
        handler = next(m for m in HANDLER.finditer(text) if "params" in m[1])
        taken = re.findall(r"string|int|bool", handler[1].replace("common_params", ""))
        kind = "str_str" if len(taken) > 1 else KINDS[taken[0]] if taken else "void"
        if text[handler.end() :].lstrip().startswith("arg_removed"):
            kind = "removed"
        environment = re.search(r'set_env\("(LLAMA_[A-Z_0-9]+)"\)', text.split("add_opt(", 1)[0])
        yield strings(begin[1]), strings(begin[2]), kind, environment and environment[1]


def main(root: Path) -> None:
    version = "{}.{}.{}-dev".format(
        *re.findall(r"set\(LLAMA_VERSION_\w+ (\d+)\)", (root / "CMakeLists.txt").read_text())
    )
    rows = [json.dumps(row) for row in options((root / "common/arg.cpp").read_text("utf-8"))]
    bench = (root / "tools/llama-bench/llama-bench.cpp").read_text("utf-8")
    names = json.dumps(re.findall(r'arg == "([^"]+)"', bench))
    print(f'{{"version": "llama.cpp {version}",\n "llama-bench": {names},\n "options": [\n', end="")
    print(",\n".join(rows) + "\n]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
