"""The flags of llama.cpp out of its sources, for tests/data/llama_flags.json: python scripts/llama_flags.py LLAMA_CPP.

LLAMA_CPP is a source tree, such as vendor/llama.cpp of the sdist of llama-cpp-python. One line per option: spellings,
spellings that negate it, what its handler takes (void, bool, int, float, str, str_str; "removed" refuses it), its
variable of the environment, and the words that it accepts, if no others.
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


def options(source: str) -> Iterator[tuple[list[str], list[str], str, str | None, list[str]]]:
    """(spellings, negated spellings, kind, environment, words) of each option of common/arg.cpp."""
    source = re.sub(r"^ *//.*$", "", source, flags=re.MULTILINE)
    begins = [m for m in OPTION.finditer(source) if strings(m[1]) and strings(m[1])[0].startswith("-")]
    for begin, after in zip(begins, [*begins[1:], None], strict=True):
        text = source[begin.end() : after.start() if after else len(source)].split("add_opt(", 1)[0]
        handler = next(m for m in HANDLER.finditer(text) if "params" in m[1])
        body = text[handler.end() :]
        environment = re.search(r'set_env\("(LLAMA_[A-Z_0-9]+)"\)', text)
        yield strings(begin[1]), strings(begin[2]), kind(handler[1], body), environment and environment[1], words(body)


def kind(parameters: str, body: str) -> str:
    """What a handler takes, by its C++ parameters and by how it reads them."""
    if body.lstrip().startswith("arg_removed"):
        return "removed"
    taken = re.findall(r"string|int|bool", parameters.replace("common_params", ""))
    if not taken or len(taken) > 1:
        return "str_str" if taken else "void"
    if re.search(r"std::sto[fd]\(value\)", body):
        return "float"
    return "int" if "std::stoul(value)" in body else KINDS[taken[0]]


def words(body: str) -> list[str]:
    """The only words that a handler accepts; [] where it takes others too."""
    if "throw" not in body or "std::sto" in body:
        return []
    found = re.findall(r'value == "([^"]+)"', body)
    if "is_truthy(value)" in body:
        found += ["on", "enabled", "true", "1", "off", "disabled", "false", "0"]
    return found + ["auto", "-1"] * ("is_autoy(value)" in body) if len(found) > 1 else []


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
