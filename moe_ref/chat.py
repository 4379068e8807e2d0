"""Messages to the prompt that a model was trained on, by the chat template in its file.

A template is a Jinja program, run in a sandbox (chat_sandbox.py) with the messages in the form that it reads
(chat_content.py). What else it is given is what Hugging Face transformers and llama.cpp give: `bos_token`, `eos_token`,
`add_generation_prompt`, today's date as `date_string` and `datetime`, and `tools` and `documents`, which are absent.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from moe_ref.chat_content import LostMessageError, render_whole
from moe_ref.chat_sandbox import MAX_TEXT, ChatTemplateError, absent, compiled
from moe_ref.vocabulary import KEY, SPECIAL, Vocabulary, read_vocabulary

__all__ = ["MAX_TEXT", "ChatTemplateError", "render_chat"]

TEMPLATE_KEY = "tokenizer.chat_template"
SAYINGS: dict[type, str] = {
    ChatTemplateError: "refused: ",
    LostMessageError: "",
}  # what an error is called; others by their kind


def render_chat(
    metadata: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kw: Any
) -> str:
    """The prompt for ``messages`` ({"role", "content", ...}), for ``Tokenizer.encode_chat``.

    It begins with bos and ends with eos where the file adds those to every text, whether the template writes them or
    not. ``kw`` goes to the template (tools, enable_thinking, ...). With tools, a template named ``tool_use`` is
    preferred. Raises ChatTemplateError, for a message too that leaves no trace in the prompt, TokenizerError for wrong
    special tokens, and GGUFError where the file of lazily read metadata is gone.
    """
    key, template = _template(metadata, bool(kw.get("tools")))
    _check_messages(messages)
    _need_jinja2()
    special, add_bos, add_eos = _special_tokens(metadata)
    for name in (name for name in ("bos_token", "eos_token") if name in template and not {**special, **kw}[name]):
        found = f"{key} writes {name}, but the file has none: it is left out"
        warnings.warn(f"{found}; set {KEY}{name}_id with gguf_new_metadata", stacklevel=2)
    values = {**_surroundings(), **special, **kw, "add_generation_prompt": add_generation_prompt}
    try:
        program = compiled(template)
        text = render_whole(lambda some: _joined(program.generate({**values, "messages": some})), messages)
    except Exception as error:  # whatever a stranger's program raises
        what = SAYINGS.get(type(error), f"{type(error).__name__}: ")
        raise ChatTemplateError(f"{key}{_line_of(error)}: {what}{error}") from error
    bos, eos = (special["bos_token"] if add_bos else ""), (special["eos_token"] if add_eos else "")
    return bos + text.removeprefix(bos).removesuffix(eos) + eos


def _template(metadata: Mapping[str, Any], tools: bool) -> tuple[str, str]:
    """The key and the text of the template to use."""
    key = f"{TEMPLATE_KEY}.tool_use"
    if not tools or key not in metadata:
        key = TEMPLATE_KEY
    template = metadata.get(key)
    if isinstance(template, str) and template.strip():
        return key, template
    found = "is missing" if template is None else f"is {template!r:.40}, expected a Jinja template"
    raise ChatTemplateError(f"{key} {found}: this model has no chat format; give it a plain prompt, or add the key")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ChatTemplateError(f"messages: {type(messages).__name__}, expected a list of {{'role', 'content'}}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(f"messages[{i}]: {message!r:.60}, expected a dict with the string 'role'")


def _surroundings() -> dict[str, Any]:
    now = datetime.now()
    dates = {"date_string": now.strftime("%d %b %Y"), "datetime": now.strftime("%b %d %Y")}
    return {"tools": absent("tools"), "documents": absent("documents"), **dates}


def _special_tokens(metadata: Mapping[str, Any]) -> tuple[dict[str, str], bool, bool]:
    """``<role>_token`` by the rules of the tokenizer, empty for bos and eos that it lacks; whether each is added."""
    if KEY + "tokens" not in metadata:
        return {"bos_token": "", "eos_token": ""}, False, False
    vocabulary = read_vocabulary(metadata)
    found = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "unk": vocabulary.unk_id, "pad": vocabulary.pad_id}
    texts = {
        f"{role}_token": _text_of(token, vocabulary, metadata) for role, token in found.items() if token is not None
    }
    return {"bos_token": "", "eos_token": "", **texts}, vocabulary.add_bos, vocabulary.add_eos


def _text_of(token: int, vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> str:
    if vocabulary.kinds[token] in SPECIAL or metadata.get(KEY + "model") is None:
        return vocabulary.texts[token]
    from moe_ref.tokenizer import load_tokenizer

    return load_tokenizer(metadata).decode([token], continues=True)


def _joined(pieces: Iterable[str]) -> str:
    text, size = [], 0
    for piece in pieces:
        text.append(piece)
        size += len(piece)
        if size > MAX_TEXT:
            raise OverflowError(f"the prompt is longer than {MAX_TEXT} characters")
    return "".join(text)


def _line_of(error: BaseException) -> str:
    """', line N' where the template failed, if known."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}" if line else ""


def _need_jinja2() -> None:
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ChatTemplateError("chat templates need Jinja; pip install 'jinja2>=3.1'") from error
