"""Reading a command line of llama.cpp or ik_llama.cpp: what it asks for, and what is wrong with it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from moe_cupy.plan.memory import MIB
from moe_cupy.plan.planner import Request
from moe_cupy.plan.rules import cpu_moe, n_cpu_ffn, n_cpu_moe, parse_overrides
from moe_cupy.plan.tables import PlanError

# Spelling -> what it sets. Flags that take a value and do not matter here are in TAKES_VALUE, switches in SWITCHES.
VALUES = {
    "-m": "model", "--model": "model", "-ngl": "ngl", "--gpu-layers": "ngl", "--n-gpu-layers": "ngl",
    "-c": "ctx", "--ctx-size": "ctx", "-ub": "ubatch", "--ubatch-size": "ubatch", "-b": "batch",
    "--batch-size": "batch", "-ctk": "ctk", "--cache-type-k": "ctk", "-ctv": "ctv", "--cache-type-v": "ctv",
    "-ot": "ot", "--override-tensor": "ot", "-ncmoe": "ncmoe", "--n-cpu-moe": "ncmoe", "-ncffn": "ncffn",
    "--n-cpu-ffn": "ncffn", "-fit": "fit", "--fit": "fit", "-fitt": "target", "--fit-target": "target",
    "-fitc": "fit_ctx", "--fit-ctx": "fit_ctx", "-fa": "fa", "--flash-attn": "fa", "-lm": "load", "--load-mode": "load",
    "-t": "threads", "--threads": "threads", "-np": "parallel", "--parallel": "parallel",
}  # fmt: skip
SWITCHES = {"-cmoe": "cmoe", "--cpu-moe": "cmoe", "--no-mmap": "no_mmap", "--mlock": "mlock", "-nkvo": "nkvo",
            "--no-kv-offload": "nkvo", "--no-op-offload": "no_op_offload", "-fmoe": "ik", "-rtr": "ik"}  # fmt: skip
TAKES_VALUE = ("--host", "--port", "-a", "--alias", "--temp", "--top-k", "--top-p", "--min-p", "-s", "--seed", "-n",
               "--predict", "-p", "--prompt", "-f", "--file", "-hf", "-mg", "--main-gpu", "-ts", "--tensor-split",
               "-sm", "--split-mode", "-tb", "-mla", "-amb", "--api-key", "-r", "-d", "-o", "-dev", "--device",
               "--chat-template", "--reasoning-format", "-sys")  # fmt: skip
KNOWN_SWITCHES = ("--jinja", "-cnv", "-no-cnv", "--metrics", "--no-warmup", "--slots", "--no-slots", "-st")
OPTIONAL_VALUE = {"fa": ("on", "off", "auto"), "fit": ("on", "off")}


@dataclass
class Command:
    """What a command says: the model, the planner's request, and remarks about it."""

    model: str | None = None
    request: Request = field(default_factory=Request)
    engine: str = "llama.cpp"
    remarks: list[str] = field(default_factory=list)


def split_words(text: str) -> list[str]:
    """Words of a POSIX or Windows line, continued lines joined. Raises PlanError for a quote that is not closed."""
    text = re.sub(r"[\\`^]\r?\n", " ", text)
    looks_windows = re.search(r"\.exe\b|[A-Za-z]:\\", text) is not None
    try:
        lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
        lexer.whitespace_split, lexer.commenters = True, ""
        if looks_windows:
            lexer.escape = ""
        return list(lexer)
    except ValueError as error:
        raise PlanError(f"--from-command: {error}; check its quotes") from error


def read_command(text: str) -> Command:
    """A command line as a request. Raises PlanError for what the engine itself would refuse."""
    words = split_words(text)
    while words and not words[0].startswith("-"):
        words = words[1:]  # the program, and what an environment sets before it
    made, fields, overrides = Command(), dict[str, Any](), []
    i = 0
    while i < len(words):
        flag, value, i = _next(words, i, made)
        name = VALUES.get(flag) or SWITCHES.get(flag)
        if name == "ot":
            overrides += parse_overrides(value)
        elif name == "cmoe":
            overrides += cpu_moe()
        elif name in ("ncmoe", "ncffn"):
            overrides += (n_cpu_moe if name == "ncmoe" else n_cpu_ffn)(whole(flag, value))
        elif name:
            fields[name] = value
    made.model = fields.get("model")
    made.request = Request(
        ctx=whole("-c", fields["ctx"]) if "ctx" in fields else None, ctk=fields.get("ctk", "f16"),
        ctv=fields.get("ctv", "f16"), ubatch=whole("-ub", fields.get("ubatch", "512")), ngl=fields.get("ngl"),
        overrides=tuple(overrides), fit=fields.get("fit", "on") != "off",
        fit_target=whole("-fitt", fields.get("target", "1024").split(",")[0]) * MIB,
        fit_ctx=whole("-fitc", fields.get("fit_ctx", "4096")), engine="ik_llama.cpp" if "ik" in fields else "llama.cpp",
    )  # fmt: skip
    made.engine = made.request.engine
    made.remarks += remarks_on(fields, overrides)
    return made


def _next(words: list[str], i: int, made: Command) -> tuple[str, str, int]:
    """The flag at i, its value ("" if none) and where the next begins."""
    flag, equals, value = words[i].partition("=") if words[i].startswith("--") else (words[i], "", "")
    name = VALUES.get(flag)
    if name in OPTIONAL_VALUE and not equals:
        given = i + 1 < len(words) and words[i + 1] in OPTIONAL_VALUE[name]
        return flag, words[i + 1] if given else "on", i + 1 + given
    if name or flag in TAKES_VALUE:
        if equals:
            return flag, value, i + 1
        if i + 1 >= len(words):
            raise PlanError(f"--from-command: {flag} is the last word and needs a value")
        return flag, words[i + 1], i + 2
    if flag not in SWITCHES and flag not in KNOWN_SWITCHES:
        made.remarks.append(f"{words[i]}: not known here; it was passed over")
    return flag, "", i + 1


def whole(flag: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise PlanError(f"{flag} {text}: expected a whole number")
    return int(text)


def remarks_on(fields: dict[str, Any], overrides: list) -> list[str]:
    """What people get wrong, one sentence each."""
    said = []
    has_layers = fields.get("ngl") not in (None, "auto")
    by_hand = ["-ngl"] * has_layers + ["overrides"] * bool(overrides)
    if by_hand and fields.get("fit", "on") != "off":
        said.append(f"{' and '.join(by_hand)} given by hand: --fit changes nothing of the placement then")
    if overrides and fields.get("load", "auto") in ("auto", "mmap") and "no_mmap" not in fields:
        said.append("tensors kept on the CPU are memory-mapped: --load-mode none (older builds: --no-mmap) is quicker")
    if fields.get("ctv", "f16") not in ("f16", "f32", "bf16") and fields.get("fa", "auto") == "off":
        said.append("-ctv with a quantized type needs flash attention: take -fa off away")
    if fields.get("ngl", "auto") not in ("auto", "all") and overrides and int(fields["ngl"] or 0) == 0:
        said.append("-ngl 0 with overrides: nothing is on the GPU but what an override names; -ngl 99 is what is meant")
    if "batch" in fields and "ubatch" in fields and whole("-ub", fields["ubatch"]) > whole("-b", fields["batch"]):
        said.append(f"-ub {fields['ubatch']} above -b {fields['batch']}: the batch is the limit; raise -b too")
    if "no_op_offload" in fields and overrides:
        said.append("--no-op-offload: a long prompt is computed by the CPU for the layers whose experts are there")
    return said
