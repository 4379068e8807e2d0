"""Vocabularies that files have and nobody plans: who adds bos and eos, and merges that do not fit the tokens.

`python tests/tokenizer_cases.py ../shared/data/golden/archs > tests/data/tokenizer_cases.json` records what llama.cpp
makes of them; it needs `pip install xllamacpp` (a prebuilt llama.cpp with its server).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

KEY = "tokenizer.ggml."
CHAT = [{"role": "user", "content": "hi"}]
SHOWN = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
TEMPLATES = {
    "no bos": SHOWN,
    "bos and eos": "{{ bos_token }}" + SHOWN + "{{ eos_token }}",
    "both twice": "{{ bos_token }}{{ bos_token }}" + SHOWN + "{{ eos_token }}{{ eos_token }}",
    "bos within": " {{ bos_token }} " + SHOWN,
}
FILES = {"llama": "mixtral.F16", "gpt2": "qwen3moe.BF16", "llama-bpe": "qwen3moe.BF16", "gemma4": "gemma4moe.BF16"}


def special_cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """A name, a file, and the keys that differ from it (None: dropped)."""
    for kind, file in FILES.items():
        pre = {KEY + "pre": kind} if kind == "llama-bpe" else {}
        for add_bos in (True, False, None):
            for add_eos in (True, None):
                for name, template in TEMPLATES.items():
                    flags = {KEY + "add_bos_token": add_bos, KEY + "add_eos_token": add_eos}
                    label = f"{kind}, bos {add_bos}, eos {add_eos}, {name}"
                    yield label, file, pre | flags | {"tokenizer.chat_template": template}
    for add_bos in (True, False, None):
        dropped = {KEY + "bos_token_id": None, KEY + "eos_token_id": None, KEY + "add_bos_token": add_bos}
        label = f"llama, bos {add_bos}, no ids"
        yield label, FILES["llama"], dropped | {"tokenizer.chat_template": TEMPLATES["bos and eos"]}


def merge_cases(read: Any) -> Iterator[tuple[str, str, dict[str, Any], list[str]]]:
    """A name, a file, the keys that differ from it, and texts; ``read`` gives a file's metadata."""
    for number, kind in enumerate(["gpt2", "llama-bpe", "gemma4"] * 2):
        pick, known = random.Random(number), read(FILES[kind])
        tokens, merges = list(known[KEY + "tokens"]), list(known[KEY + "merges"])
        letters = [token for token in tokens if len(token) == 1 and token.isalnum()]
        for i in pick.sample([i for i, token in enumerate(tokens) if 1 < len(token) < 6 and i > 250], 25):
            tokens[i] = f"<renamed {i}>"
        for _ in range(30):
            sides = (pick.choice([*letters, *merges]).replace(" ", "") for _ in "12")
            merges.insert(pick.randrange(len(merges)), " ".join(sides))
        merges += ["nospace", "", "x ", " a b", "hello wor", "th ere", "zq x"]
        pieces = [*(merge.replace(" ", "") for merge in merges), *letters, " ", "\n", "é", "🙂", "there", "hello"]
        texts = ["".join(pick.choices(pieces, k=pick.randint(1, 9))).replace("Ġ", " ") for _ in range(25)]
        pre = {KEY + "pre": kind} if kind == "llama-bpe" else {}
        yield f"merges {number}, {kind}", FILES[kind], pre | {KEY + "tokens": tokens, KEY + "merges": merges}, texts


# ---- recording


def recorded(folder: Path) -> dict[str, Any]:
    """Ids that llama.cpp makes: of the chat prompt of "hi", and of the texts of the merge cases."""
    answers: dict[str, Any] = {}
    for label, file, changes in special_cases():
        answers[label] = _asked(folder / f"{file}.gguf", changes, None)
    for label, file, changes, texts in merge_cases(lambda name: _metadata(folder / f"{name}.gguf")):
        answers[label] = _asked(folder / f"{file}.gguf", changes, texts)
    return answers


def _metadata(path: Path) -> Mapping[str, Any]:
    from moe_ref.gguf import open_gguf

    return open_gguf(path).metadata


def _asked(source: Path, changes: Mapping[str, Any], texts: list[str] | None) -> Any:
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "model.gguf")
        _write(source, path, changes)
        command = [sys.executable, __file__, path, json.dumps(texts)]
        return json.loads(subprocess.run(command, timeout=60, check=True, stdout=subprocess.PIPE).stdout)


def _write(source: Path, path: str, changes: Mapping[str, Any]) -> None:
    from gguf_writer import value_bytes

    from moe_ref.gguf import open_gguf
    from moe_ref.gguf_write import header, padding

    with open_gguf(source) as file, open(path, "wb") as out:
        kept = {key: file.value_bytes(key) for key in file.metadata if key not in changes}
        new = {key: value_bytes(value) for key, value in changes.items() if value is not None}
        out.write(header(kept | new, [(t.name, t.type, t.shape) for t in file.tensors.values()], 32))
        for name in file.tensors:
            raw = bytes(file.read(name))
            out.write(raw + padding(len(raw), 32))


def ask(path: str, texts: list[str] | None) -> Any:
    """What one file's server says."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.use_jinja, params.n_ctx, params.warmup, params.port = path, True, 64, False, 0
    server = xllamacpp.Server(params)

    def post(place: str, **body: Any) -> Any:
        json_type = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + place, json.dumps(body).encode(), json_type)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    if texts is not None:
        return [post("/tokenize", content=text)["tokens"] for text in texts]
    prompt = post("/apply-template", messages=CHAT)["prompt"]
    return post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]


if __name__ == "__main__":
    place, *texts = sys.argv[1:]
    if not texts:
        sys.path.insert(0, os.getcwd())
    print(json.dumps(ask(place, json.loads(texts[0])) if texts else recorded(Path(place))), flush=True)
    os._exit(0)  # the server's own end may wait for ever
