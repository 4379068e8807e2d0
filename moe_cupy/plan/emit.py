"""The plan as commands of other engines, quoted for the shell that runs them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace

from moe_cupy.plan.choose import best_static
from moe_cupy.plan.cost import NEVER
from moe_cupy.plan.own_command import own_words
from moe_cupy.plan.planner import Plan
from moe_cupy.plan.rules import CPU, DENSE_FFN, EXPERTS, Override
from moe_cupy.plan.tables import OWN, DoesNotFit

SAFE_ON_WINDOWS = re.compile(r"[A-Za-z0-9_./:\\=@+-]+")


def quote(words: Sequence[str], windows: bool) -> str:
    """A line for POSIX shells, or for cmd and PowerShell (for PowerShell alone where a word has one of $, `, \", %)."""
    return " ".join(map(_windows, words)) if windows else shlex.join(words)


def _windows(word: str) -> str:
    if SAFE_ON_WINDOWS.fullmatch(word):
        return word
    if any(char in word for char in '$`"%'):
        return "'" + word.replace("'", "''").replace('"', '\\"') + "'"
    trailing = len(word) - len(word.rstrip("\\"))
    return f'"{word}{chr(92) * trailing}"'


def command(plan: Plan, engine: str, windows: bool = False) -> str:
    """The command that comes nearest to the plan; for ktransformers its YAML rules with the command above them."""
    if engine == "ktransformers":
        return ktransformers(plan, windows)
    if engine == OWN:
        return quote(own_words(plan, model_file(plan), placement_words(plan, "llama.cpp")), windows)
    words = ["llama-server.exe" if windows else "llama-server", *(plan.model.repository or ("-m", model_file(plan)))]
    ngl = plan.ngl + (plan.model.layers_behind if plan.ngl > 1 else 0)  # the last layers of a file count first
    words += ["-ngl", str(min(ngl, 99) if plan.ngl <= plan.model.layers else 99), *placement_words(plan, engine)]
    s = plan.settings
    words += ["-c", str(s.ctx), "-ub", str(s.ubatch), "-b", str(max(2048, s.ubatch))]
    words += ["-fa", "on"] if engine == "llama.cpp" else ["-fa"]
    if (s.ctk, s.ctv) != ("f16", "f16"):
        words += ["-ctk", s.ctk, "-ctv", s.ctv]
    words += [*asked_words(plan, engine), "-t", str(plan.machine.cores)]
    if engine == "ik_llama.cpp":
        words += ["-fmoe", *(["-mla", "3"] if any(p.mixer == "mla" for p in plan.model.pasts) else [])]
        words += ["--no-mmap"] if not plan.disk_bytes else []
    elif host_tensors(plan) and not plan.disk_bytes:
        words += ["--load-mode", "none"]
    if engine == "llama.cpp" and plan.machine.gpu:
        words += ["--fit", "off"]
    return quote(words, windows)


def asked_words(plan: Plan, engine: str) -> list[str]:
    """What a line asked for beside places, and was planned with."""
    request, words = plan.request, []
    if request.kv_on_host:
        words.append("-nkvo")
    if request.threshold >= NEVER and engine == "llama.cpp":
        words.append("--no-op-offload")
    if request.used:
        words += ["--override-kv", f"{plan.model.architecture}.expert_used_count=int:{plan.model.expert_used_count}"]
    return words


def model_file(plan: Plan) -> str:
    if plan.model.file:
        return plan.model.file
    name = plan.model.name
    return name if name.endswith(".gguf") else f"{name}-{plan.model.quant}.gguf"


def placement_words(plan: Plan, engine: str) -> list[str]:
    """The flags that place tensors: as given, or what the plan found; an expert cache has no flag there."""
    given = plan.request.overrides
    if given:
        return _override_words(given, engine, plan.model.layers)
    sparse = static_experts(plan)
    if not sparse:
        return []
    if sparse >= plan.model.layers:
        return ["--cpu-moe"] if engine == "llama.cpp" else ["-ot", f"{EXPERTS}={CPU}"]
    if engine == "llama.cpp":
        return ["--n-cpu-moe", str(sparse)]
    return ["-ot", _first_layers(sparse, EXPERTS)]


def _first_layers(count: int, what: str) -> str:
    """What --n-cpu-moe N means, as one rule."""
    return rf"blk\.({numbers_below(count)}){what}={CPU}"


def numbers_below(n: int) -> str:
    """A regular expression for 0 to n - 1, n at most 100: [0-9]|[1-3][0-9]|4[0-1]; beyond that each number itself."""
    tens, rest = divmod(n, 10)
    if n > 100:
        return "|".join(map(str, range(n)))
    parts = [_digits(0, min(n, 10) - 1)]
    parts += [f"{_digits(1, tens - 1)}[0-9]"] * (tens > 1)
    parts += [f"{tens}{_digits(0, rest - 1)}"] * (tens > 0 and rest > 0)
    return "|".join(parts)


def _digits(first: int, last: int) -> str:
    return str(first) if first == last else f"[{first}-{last}]"


def static_experts(plan: Plan) -> int:
    """N of --n-cpu-moe; for a plan with a cache, what --fit finds for the same context."""
    if not plan.cache_slots:
        return plan.n_cpu_moe or 0
    return without_cache(plan).n_cpu_moe or 0


def without_cache(plan: Plan) -> Plan:
    """The same request where tensors stay in place: what the emitted commands do."""
    return best_static(plan.model, plan.machine, replace(plan.request, ctx=plan.settings.ctx), plan.curve)


def that_fits(plan: Plan) -> Plan | None:
    """The same settings with the placement left to the planner; None where they fit nowhere."""
    free = replace(plan.request, ngl=None, overrides=(), fit=True, overfull=False)
    try:
        return best_static(plan.model, plan.machine, free, plan.curve)
    except DoesNotFit:
        return None


def _override_words(rules: Sequence[Override], engine: str, layers: int) -> list[str]:
    """Flags of one kind in a row become one word again."""
    words: list[str] = []
    done = 0
    while done < len(rules):
        flag = rules[done].flag
        run = [r for r in rules[done:] if r.flag == flag]
        same = next((i for i, r in enumerate(rules[done:]) if r.flag != flag), len(rules) - done)
        counts = flag in ("--n-cpu-moe", "--n-cpu-ffn")
        if counts and engine != "llama.cpp":
            words += ["-ot", _first_layers(min(same, layers), EXPERTS if flag == "--n-cpu-moe" else DENSE_FFN)]
        elif flag == "-ot" or engine != "llama.cpp":
            words += ["-ot", ",".join(f"{r.pattern}={r.device}" for r in run[:same])]
        elif flag == "--cpu-moe":
            words += [flag]
        else:
            words += [flag, str(same)]
        done += same
    return words


def host_tensors(plan: Plan) -> bool:
    """Whether weights stay in host memory by an override, which memory mapping makes slow."""
    return plan.machine.gpu is not None and any(
        plan.placement.device[t.name] == CPU for t in plan.model.tensors if t.part == "routed"
    )


KT_RULES = """- match:
    name: "^model\\\\.layers\\\\.({layers})\\\\.mlp\\\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      prefill_device: "cuda"
      generate_device: "{device}"
      generate_op: "{op}"
      out_device: "cuda"
  recursive: False
"""


def ktransformers(plan: Plan, windows: bool = False) -> str:
    """Rules for the experts, layer by layer, and the command that reads them."""
    placement = (without_cache(plan) if plan.cache_slots else plan).placement
    away = {t.layer for t in placement.on(CPU, plan.model.tensors) if t.part == "routed"}
    moe = plan.model.moe_layers
    groups = [([i for i in moe if i in away], "cpu", "KExpertsCPU"),
              ([i for i in moe if i not in away], "cuda", "KExpertsMarlin")]  # fmt: skip
    rules = [KT_RULES.format(layers="|".join(map(str, layers)), device=d, op=op) for layers, d, op in groups if layers]
    words = ["python", "-m", "ktransformers.local_chat", "--gguf_path", model_file(plan), "--optimize_config_path",
             "rules.yaml", "--cpu_infer", str(plan.machine.cores)]  # fmt: skip
    return f"# {quote(words, windows)}\n" + "".join(rules)
