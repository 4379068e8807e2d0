"""Names of models as people write them: which preset is meant, and in which quantization."""

from __future__ import annotations

import difflib
import re

from moe_cupy.plan.tables import PlanError, table

# Words that say nothing about a shape: who tuned, packed or quantized it, and when.
FILLERS = re.compile(
    r"(instruct|thinking|chat|it|base|gguf|ud|mtp|hf|i1|imatrix|dynamic|bf16|v?0\.\d|v\d(\.\d)?|\d{4}|\d{5}|of|part\d*|"
    r"unsloth|bartowski|ggml|org|mradermacher|lmstudio|community|mlx|abliterated|heretic|reap|"
    r"qwen|zai|openai|meta|llama|google|moonshotai|deepseek|ai|mistralai|minimaxai|allenai|huihui|"  # OWNER_NAME.gguf
    r"terminus|mix|smol|pure|r4|r8|\d+k|1m)"
)


def presets() -> dict[str, str]:
    """Every name, lower case, and the preset it stands for."""
    models = table("models")
    names = {key.lower(): key for key in models}
    return names | {other: key for key, row in models.items() for other in row.get("also", ())}


def spelled(text: str) -> str:
    """A name without owner and case, words apart by a hyphen: "unsloth/Qwen3_30B A3B" -> "qwen3-30b-a3b"."""
    return re.sub(r"[\s_-]+", "-", re.split(r"[/\\]", text)[-1].strip().lower()).removesuffix(".gguf")


def known_as(text: str) -> str:
    """The preset of a name. Raises PlanError listing the nearest."""
    return model_named(text)[0]


def model_named(text: str) -> tuple[str, str | None]:
    """Preset and quantization (None: not said) of a name such as "Qwen3-30B-A3B-Instruct-2507-Q5_K_M".

    Raises PlanError listing the nearest names for one whose words are not all understood.
    """
    head, _, tag = text.partition(":") if not re.match(r"[A-Za-z]:[\\/]", text) else (text, "", "")
    name = spelled(head)
    names = presets()
    if name in names:
        return names[name], tag or None
    found, rest = longest_within(name)
    quant = quantization_in(rest)
    words = re.sub(re.escape(spelled(quant)), "", rest) if quant else rest
    if found and all(map(is_filler, words.split("-"))):
        return names[found], tag or quant
    near = difflib.get_close_matches(name, names, 3, 0.3)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    no_file = text.endswith(".gguf")
    what = "there is no such file, and its name is no preset's" if no_file else "neither a file nor a preset"
    raise PlanError(f"{text}: {what}; {hint}presets: {', '.join(sorted(table('models')))}")


def is_filler(word: str) -> bool:
    """Also of several parts, as in "abliterated.i1"."""
    word = word.strip(".")
    return not word or FILLERS.fullmatch(word) is not None or all(map(FILLERS.fullmatch, word.split(".")))


def longest_within(name: str) -> tuple[str | None, str]:
    """The longest known name in ``name`` that stands alone, and what is left without it."""
    for known in sorted(presets(), key=len, reverse=True):
        match = re.search(rf"(?<![a-z0-9.]){re.escape(known)}(?![a-z0-9])(?!\.\d)", name)
        if match:
            return known, f"{name[: match.start()]}-{name[match.end() :]}"
    return None, name


def quantization_in(text: str) -> str | None:
    """The longest quantization that a name has, as the tables spell it."""
    mixes = table("mixes")
    spelled_so = {spelled(name): name for name in (*mixes, *mixes["alias"]) if name != "alias"}
    within = [s for s in spelled_so if re.search(rf"(?<![a-z0-9]){re.escape(s)}(?![a-z0-9])", spelled(text))]
    return spelled_so[max(within, key=len)] if within else None
