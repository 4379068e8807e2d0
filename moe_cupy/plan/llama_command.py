"""Reading a command line of llama.cpp or ik_llama.cpp: what it asks for, and what is wrong with it.

Every flag of both (``data/flags.toml``) is planned with, told about, or named as of no matter; so is the environment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from moe_cupy.plan.cost import NEVER, THRESHOLD
from moe_cupy.plan.flag_table import OPTIONAL_VALUE, flags_of_environment, others, spellings
from moe_cupy.plan.llama_refused import VERSION, Word, older, refusals
from moe_cupy.plan.llama_words import LOOKS_WINDOWS, another_program, environment, program_and_flags, split_words
from moe_cupy.plan.memory import MIB
from moe_cupy.plan.planner import Request
from moe_cupy.plan.rules import CPU, GPU, Override, cpu_moe, n_cpu_ffn, n_cpu_moe, parse_overrides
from moe_cupy.plan.tables import PlanError, table

IK_FLAGS = ("-fmoe", "-rtr", "-amb", "-mla", "-ser", "-ooae", "-no-ooae", "-no-fmoe", "-muge", "-mqkv", "-ger", "-gr",
            "-sas", "-smgs", "-khad", "-vhad", "-cuda", "-op", "-okv", "--fit-margin")  # fmt: skip
NUMBERS = ("ngl", "ncmoe", "ncffn", "ctx", "ubatch", "batch", "threads")
MOST_LAYERS = 4096
DEFAULT_BATCH = 2048  # of -b; a -ub above it changes nothing


@dataclass
class Command:
    """What a command says: the model, the planner's request, and remarks about it."""

    model: str | None = None
    threads: int | None = None
    repository: tuple[str, ...] = ()  # -hf and -hff, where they name the model instead of -m
    windows: bool = False  # whether it was written for cmd or PowerShell
    request: Request = field(default_factory=Request)
    engine: str = "llama.cpp"
    remarks: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # why no program of llama.cpp starts with it


@dataclass
class Said:
    """A line taken apart: name of a modelled flag -> its last value, rules of placement in order, and the rest."""

    fields: dict[str, str] = field(default_factory=dict)
    overrides: list[Override] = field(default_factory=list)
    told: dict[str, str] = field(default_factory=dict)  # flag -> what is said of it
    no_matter: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    cards: set[str] = field(default_factory=set)  # further ones that overrides name
    words: list[Word] = field(default_factory=list)
    is_ik: bool = False


def read_command(text: str) -> Command:
    """A command line as a request. Raises PlanError for what the engine itself would refuse."""
    before, words = program_and_flags(split_words(text))
    around = environment(before)
    words = [*(word for flag in flags_of_environment(around) for word in flag), *words]
    said = Said()
    i = 0
    while i < len(words):
        i = _take(words, i, said)
    f = said.fields
    batch = whole("-b", f.get("batch", str(DEFAULT_BATCH)))
    threshold = whole("GGML_OP_OFFLOAD_MIN_BATCH", around.get("GGML_OP_OFFLOAD_MIN_BATCH", str(THRESHOLD)))
    engine = "ik_llama.cpp" if said.is_ik else "llama.cpp"
    request = Request(
        ctx=whole("-c", f["ctx"]) if "ctx" in f else None, ctk=f.get("ctk", "f16"), ctv=f.get("ctv", "f16"),
        ubatch=min(batch, whole("-ub", f.get("ubatch", "512")) or batch), ngl=f.get("ngl"),
        overrides=tuple(said.overrides), fit=f.get("fit", "off" if said.is_ik else "on") != "off",
        fit_target=whole("-fitt", f.get("target", "1024").split(",")[0]) * MIB,
        fit_ctx=whole("-fitc", f.get("fit_ctx", "4096")), engine=engine,
        threshold=NEVER if "no_op_offload" in f else threshold, pageable=is_mapped(f),
        kv_on_host="nkvo" in f, used=used_experts(f),
    )  # fmt: skip
    threads = f.get("threads", "")
    made = Command(f.get("model") or file_of_repository(f), engine=engine, request=request,
                   repository=repository_words(f), windows=LOOKS_WINDOWS.search(text) is not None)  # fmt: skip
    made.threads = int(threads) if re.fullmatch(r"[1-9]\d{0,3}", threads) else None
    made.refused = list(refusals(said.words, any("llama-bench" in word for word in before)))
    made.remarks = [*another_program(before), *remarks_on(said), *remarks_on_environment(around)]
    return made


def _take(words: list[str], i: int, said: Said) -> int:
    """Read the flag at i into ``said``; where the next begins."""
    flag, value, after = _flag(words, i)
    said.is_ik |= flag in IK_FLAGS
    said.words.append((words[i], flag, value))
    if flag not in spellings():
        if flag not in others():
            said.unknown.append(words[i])
        elif others()[flag][0]:
            said.told[flag] = others()[flag][0]
        else:
            said.no_matter.append(flag)
        return after
    name = spellings()[flag][0]
    if name in NUMBERS and re.fullmatch(r"\d+([,-]\d+)+", value):
        raise PlanError(f"--from-command: {flag} {value[:40]}: a list, as llama-bench takes; name one value of it")
    if name == "ot":
        said.overrides += parse_overrides(on_one_card(value, said), (CPU, GPU))
    elif name == "cmoe":
        said.overrides += cpu_moe()
    elif name in ("ncmoe", "ncffn"):
        said.overrides += (n_cpu_moe if name == "ncmoe" else n_cpu_ffn)(whole(flag, value, MOST_LAYERS))
    else:
        said.fields[name] = value
    return after


def _flag(words: list[str], i: int) -> tuple[str, str, int]:
    """The flag at i, its value ("" if none) and where the next begins."""
    flag, equals, value = words[i].partition("=") if words[i].startswith("--") else (words[i], "", "")
    if flag.startswith("--"):
        flag = flag.replace("_", "-")  # as there
    name, takes = (spellings() | others()).get(flag, ("", None))
    if name in OPTIONAL_VALUE and flag in spellings():
        given = equals or (i + 1 < len(words) and not words[i + 1].startswith("-"))
        word = value if equals else words[i + 1] if given else "on"
        if word.lower() not in OPTIONAL_VALUE[name]:
            raise PlanError(f"{flag} {word[:40]}: expected one of {', '.join(OPTIONAL_VALUE[name])}")
        return flag, OPTIONAL_VALUE[name][word.lower()], i + 1 + bool(given and not equals)
    if takes and not equals:
        if i + 1 >= len(words):
            raise PlanError(f"--from-command: {flag} is the last word and needs a value")
        return flag, words[i + 1], i + 2
    if takes is None and not equals and i + 1 < len(words) and re.match(r"[^-]|-\d|$", words[i + 1]):
        return flag, "", i + 2  # not known: what looks like its value goes with it
    return flag, value, i + 1


def on_one_card(rules: str, said: Said) -> str:
    """Rules of -ot with the first card for every card, and page-locked host memory as the CPU's; cards are noted.

    llama-bench parts rules by semicolons.
    """
    rules = re.sub(r"(=[A-Za-z]+\d*(?:_Host)?);(?=.)", r"\1,", rules)
    said.cards |= set(re.findall(r"=((?:CUDA|ROCm|Vulkan|SYCL)[1-9]\d*)(?=,|$)", rules))
    rules = re.sub(r"=(?:CUDA|ROCm|Vulkan|SYCL)\d+(?=,|$)", f"={GPU}", rules)
    return re.sub(r"=(?:CUDA|ROCm|SYCL|Vulkan)_Host(?=,|$)", f"={CPU}", rules)


def file_of_repository(fields: dict[str, str]) -> str | None:
    """A file's name for ``-hf owner/name-GGUF:Q4_K_M``; without a quantization the engine takes Q4_K_M if it can."""
    if "hf_file" in fields:
        return fields["hf_file"]
    if not fields.get("hf"):
        return None
    name, _, quant = fields["hf"].rpartition("/")[2].partition(":")
    return re.sub(r"(?i)-gguf$", "", name) + (f"-{quant}" if quant else "") + ".gguf"


def repository_words(fields: dict[str, str]) -> tuple[str, ...]:
    """-hf, and -hff, as a command repeats them."""
    if fields.get("model") or not fields.get("hf"):
        return ()
    return ("-hf", fields["hf"], *(("-hff", fields["hf_file"]) if "hf_file" in fields else ()))


def is_mapped(fields: dict[str, str]) -> bool:
    """Whether weights in host memory stay pages of the file."""
    return fields.get("load", "auto") in ("auto", "mmap", "mmap+mlock") and not {"no_mmap", "rtr"} & set(fields)


def used_experts(fields: dict[str, str]) -> int | None:
    """Experts a token uses by --override-kv …expert_used_count=int:N or by -ser N,1; None: as the model has it."""
    found = re.search(r"\.expert_used_count=int:([1-9]\d{0,3})", fields.get("kv", ""))
    reduced = re.fullmatch(r"([1-9]\d{0,3}),1(?:\.0*)?", fields.get("ser", ""))
    return int((found or reduced)[1]) if found or reduced else None  # type: ignore[index]


def whole(flag: str, text: str, most: int = 10**9) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) > most:
        raise PlanError(f"{flag} {text[:40]}: expected a whole number up to {most}")
    return int(text)


def remarks_on(said: Said) -> list[str]:
    """What people get wrong, what is not planned with, and what does not matter: a sentence each."""
    from moe_cupy.plan.llama_remarks import mistakes, not_planned

    lines = [f"{word}: not known to {VERSION} and ik_llama.cpp, which refuse it; passed over" for word in said.unknown]
    lines += [] if said.is_ik else older(said.words)
    lines += [*mistakes(said.fields, said.overrides), *not_planned(said.fields, sorted(said.cards))]
    lines += [f"{flag}: {text}" for flag, text in said.told.items()]
    if said.no_matter:
        lines.append(f"of no matter for places and speeds: {', '.join(dict.fromkeys(said.no_matter))}")
    return lines


def remarks_on_environment(around: dict[str, str]) -> list[str]:
    flags = table("flags")
    told, read = flags["environment_told"], {*flags["environment"], "GGML_OP_OFFLOAD_MIN_BATCH"}
    known = [f"{name}={value}: {told[name]}" for name, value in around.items() if name in told]
    rest = [name for name in around if name not in told and name not in read]
    return known + [f"of no matter for places and speeds: {', '.join(rest)}"] * bool(rest)
