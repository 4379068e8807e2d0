"""Reading a command line of llama.cpp or ik_llama.cpp: what it asks for, and what is wrong with it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from moe_cupy.plan.cost import THRESHOLD
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
    "-t": "threads", "--threads": "threads", "-np": "parallel", "--parallel": "parallel", "-hf": "hf", "-hfr": "hf",
    "--hf-repo": "hf",
}  # fmt: skip
SWITCHES = {"-cmoe": "cmoe", "--cpu-moe": "cmoe", "--no-mmap": "no_mmap", "--mlock": "mlock", "-nkvo": "nkvo",
            "--no-kv-offload": "nkvo", "--no-op-offload": "no_op_offload", "-fmoe": "ik", "-rtr": "rtr"}  # fmt: skip
TAKES_VALUE = ("--host", "--port", "-a", "--alias", "--temp", "--top-k", "--top-p", "--min-p", "-s", "--seed", "-n",
               "--predict", "-p", "--prompt", "-f", "--file", "-mg", "--main-gpu", "-ts", "--tensor-split",
               "-sm", "--split-mode", "-tb", "-mla", "-amb", "--api-key", "-r", "-d", "-o", "-dev", "--device",
               "--chat-template", "--reasoning-format", "-sys")  # fmt: skip
KNOWN_SWITCHES = ("--jinja", "-cnv", "-no-cnv", "--metrics", "--no-warmup", "--slots", "--no-slots", "-st")
SWITCH_WORDS = {"on": "on", "1": "on", "true": "on", "enabled": "on", "off": "off", "0": "off", "false": "off",
                "disabled": "off"}  # fmt: skip
OPTIONAL_VALUE = {"fa": SWITCH_WORDS | {"auto": "auto", "-1": "auto"}, "fit": SWITCH_WORDS}
PROGRAM = re.compile(r"(.*[/\\])?llama-[a-z-]+(\.exe)?", re.IGNORECASE)
MOST_LAYERS = 4096
DEFAULT_BATCH = 2048  # of -b; a -ub above it changes nothing
ENVIRONMENT = {
    "LLAMA_ARG_MODEL": "-m", "LLAMA_ARG_HF_REPO": "-hf", "LLAMA_ARG_N_GPU_LAYERS": "-ngl", "LLAMA_ARG_CTX_SIZE": "-c",
    "LLAMA_ARG_BATCH": "-b", "LLAMA_ARG_UBATCH": "-ub", "LLAMA_ARG_CACHE_TYPE_K": "-ctk",
    "LLAMA_ARG_CACHE_TYPE_V": "-ctv", "LLAMA_ARG_OVERRIDE_TENSOR": "-ot", "LLAMA_ARG_N_CPU_MOE": "-ncmoe",
    "LLAMA_ARG_FLASH_ATTN": "-fa", "LLAMA_ARG_THREADS": "-t", "LLAMA_ARG_FIT": "-fit",
}  # fmt: skip


@dataclass
class Command:
    """What a command says: the model, the planner's request, and remarks about it."""

    model: str | None = None
    threads: int | None = None
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
    before, words = program_and_flags(split_words(text))
    set_there = dict(word.split("=", 1) for word in before if re.match(r"[A-Z][A-Z0-9_]*=", word))
    words = [w for name, value in set_there.items() if name in ENVIRONMENT for w in (ENVIRONMENT[name], value)] + words
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
            overrides += (n_cpu_moe if name == "ncmoe" else n_cpu_ffn)(whole(flag, value, MOST_LAYERS))
        elif name:
            fields[name] = value
    made.model = fields.get("model") or file_of_repository(fields.get("hf"))
    made.threads = int(fields["threads"]) if re.fullmatch(r"[1-9]\d{0,3}", fields.get("threads", "")) else None
    batch = whole("-b", fields.get("batch", str(DEFAULT_BATCH)))
    ubatch = min(batch, whole("-ub", fields.get("ubatch", "512")) or batch)
    made.engine = "ik_llama.cpp" if {"ik", "rtr"} & set(fields) else "llama.cpp"
    made.request = Request(
        ctx=whole("-c", fields["ctx"]) if "ctx" in fields else None, ctk=fields.get("ctk", "f16"),
        ctv=fields.get("ctv", "f16"), ubatch=ubatch, ngl=fields.get("ngl"),
        overrides=tuple(overrides), fit=fields.get("fit", "on") != "off",
        fit_target=whole("-fitt", fields.get("target", "1024").split(",")[0]) * MIB,
        fit_ctx=whole("-fitc", fields.get("fit_ctx", "4096")), engine=made.engine,
        threshold=whole("GGML_OP_OFFLOAD_MIN_BATCH", set_there.get("GGML_OP_OFFLOAD_MIN_BATCH", str(THRESHOLD))),
    )  # fmt: skip
    made.remarks += remarks_on(fields, overrides)
    return made


def program_and_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the flags (the program, another that starts it, what the environment is), and the flags."""
    named = next((i + 1 for i, word in enumerate(words) if PROGRAM.fullmatch(word)), 0)
    start = next((i for i in range(named, len(words)) if words[i].startswith("-")), len(words))
    return words[:start], words[start:]


def file_of_repository(text: str | None) -> str | None:
    """A file's name for ``-hf owner/name-GGUF:Q4_K_M``; without a quantization the engine takes Q4_K_M if it can."""
    if not text:
        return None
    name, _, quant = text.rpartition("/")[2].partition(":")
    return re.sub(r"(?i)-gguf$", "", name) + (f"-{quant}" if quant else "") + ".gguf"


def _next(words: list[str], i: int, made: Command) -> tuple[str, str, int]:
    """The flag at i, its value ("" if none) and where the next begins."""
    flag, equals, value = words[i].partition("=") if words[i].startswith("--") else (words[i], "", "")
    if flag.startswith("--"):
        flag = flag.replace("_", "-")  # as there
    name = VALUES.get(flag)
    if name in OPTIONAL_VALUE and not equals:
        given = i + 1 < len(words) and words[i + 1] in OPTIONAL_VALUE[name]
        return flag, OPTIONAL_VALUE[name][words[i + 1]] if given else "on", i + 1 + given
    if name or flag in TAKES_VALUE:
        if equals:
            return flag, value, i + 1
        if i + 1 >= len(words):
            raise PlanError(f"--from-command: {flag} is the last word and needs a value")
        return flag, words[i + 1], i + 2
    if flag not in SWITCHES and flag not in KNOWN_SWITCHES:
        made.remarks.append(f"{words[i]}: not known here; it was passed over")
        if i + 1 < len(words) and re.match(r"[^-]|-\d|$", words[i + 1]):
            return flag, "", i + 2  # its value
    return flag, "", i + 1


def whole(flag: str, text: str, most: int = 10**9) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or int(text) > most:
        raise PlanError(f"{flag} {text[:40]}: expected a whole number up to {most}")
    return int(text)


def remarks_on(fields: dict[str, Any], overrides: list) -> list[str]:
    """What people get wrong, one sentence each."""
    said = []
    has_layers = fields.get("ngl") not in (None, "auto")
    by_hand = ["-ngl"] * has_layers + ["overrides"] * bool(overrides)
    if by_hand and fields.get("fit", "on") != "off":
        said.append(f"{' and '.join(by_hand)} given by hand: --fit changes nothing of the placement then")
    if overrides and fields.get("load", "auto") in ("auto", "mmap") and not {"no_mmap", "rtr"} & set(fields):
        said.append("tensors kept on the CPU are memory-mapped: --load-mode none (older builds: --no-mmap) is quicker")
    if fields.get("ctv", "f16") not in ("f16", "f32", "bf16") and fields.get("fa", "auto") == "off":
        said.append("-ctv with a quantized type needs flash attention: take -fa off away")
    if fields.get("ngl") == "0" and overrides:
        said.append("-ngl 0 with overrides: nothing is on the GPU but what an override names; -ngl 99 is what is meant")
    batch = fields.get("batch", str(DEFAULT_BATCH))
    if whole("-ub", fields.get("ubatch", "512")) > whole("-b", batch) and "ubatch" in fields:
        said.append(f"-ub {fields['ubatch']} above -b {batch}: the batch is the limit, planned with it; raise -b too")
    if "nkvo" in fields:
        said.append("-nkvo: the context is in host memory and attention is computed there; planned as if it were on "
                    "the card, which is quicker and takes more of it")  # fmt: skip
    if "no_op_offload" in fields and overrides:
        said.append("--no-op-offload: a long prompt is computed by the CPU for the layers whose experts are there")
    return said
