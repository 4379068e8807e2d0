"""Messages to the prompt that a model was trained on, by the chat template in its file.

A template is a Jinja program written by a stranger, so it runs in Jinja's sandbox, without access to files, modules,
or the inside of objects, and it cannot change the messages. Bounded here: `range` (100 000), the results of + * ** ~,
integers given to calls, the output, the depth of recursion. Not bounded: the time that nested loops take, and the
memory that filters (`replace`, `join`, `center`) and widths in formats take; for untrusted files, limit the process.

Extensions to Jinja are those of Hugging Face transformers, for which templates are written: `raise_exception`,
`strftime_now`, `tojson`, loop controls, the `generation` tag (source: transformers/utils/chat_template_utils.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

TEMPLATE_KEY = "tokenizer.chat_template"
MAX_TEXT = 2**24  # characters of a prompt, and of any text or list that an operator makes
MAX_BITS = 4096  # of an integer that an operator makes
TOKEN_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # <role>_token: its key


class ChatTemplateError(ValueError):
    """A chat template that is missing, wrong, refuses the messages, or asks for what the sandbox forbids."""


def render_chat(
    metadata: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kw: Any
) -> str:
    """The prompt for ``messages`` ({"role", "content", ...}); encode it with ``add_special=False``: it has its own bos.

    ``kw`` goes to the template (tools, enable_thinking, ...). With tools, a template named ``tool_use`` is preferred.
    Raises ChatTemplateError (and GGUFError where the file of lazily read metadata is gone).
    """
    key, template = _template(metadata, bool(kw.get("tools")))
    _check_messages(messages)
    values = {"tools": None, "documents": None, **_special_tokens(metadata), **kw}
    values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    _need_jinja2()
    try:
        return _joined(_compiled(template).generate(values))
    except Exception as error:  # whatever a stranger's program raises
        what = "refused" if isinstance(error, ChatTemplateError) else type(error).__name__
        raise ChatTemplateError(f"{key}{_line_of(error)}: {what}: {error}") from error


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


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and ``eos_token``, empty when the file names none, and ``unk_token``, ``pad_token`` if there."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    found = {"bos_token": "", "eos_token": ""}
    for role, name in TOKEN_ROLES.items():
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            found[f"{role}_token"] = tokens[token]
    return found


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


# ---- the sandbox; jinja2 is imported where it is used


def _need_jinja2() -> None:
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ChatTemplateError("chat templates need Jinja; pip install 'jinja2>=3.1'") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@cache
def _environment() -> Any:
    extensions = ["jinja2.ext.loopcontrols", _generation_tag()]
    environment = _sandbox()(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    del environment.globals["lipsum"]  # random filler text of any length
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, unlike Jinja's own filter, which escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(message)


def _sandbox() -> Any:
    """Jinja's immutable sandbox, whose operators and calls cannot ask for huge results."""
    from jinja2.compiler import CodeGenerator
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generator(CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:  # a ~ b
            self.write("environment.concatenated((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Sandbox(ImmutableSandboxedEnvironment):
        code_generator_class = Generator
        intercepted_binops = frozenset(["+", "*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                _check_size("an argument", value if isinstance(value, int) else 0)
            return super().call(__context, __obj, *args, **kwargs)

        def concatenated(self, parts: tuple[Any, ...]) -> str:
            texts = [str(part) for part in parts]
            _check_size("~", sum(map(len, texts)))
            return "".join(texts)

    return Sandbox


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would have more than MAX_TEXT characters or elements, or MAX_BITS bits."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        _check_size(f"bits of {operator}", bits, MAX_BITS)
    elif operator == "*":
        _check_size(operator, _length(left) * _length(right))
    else:
        _check_size(operator, _length(left) + _length(right))


def _length(operand: Any) -> int:
    return operand if isinstance(operand, int) else len(operand) if hasattr(operand, "__len__") else 1


def _check_size(what: str, size: int, limit: int = MAX_TEXT) -> None:
    if abs(size) > limit:
        raise OverflowError(f"{what}: {size} is more than the {limit} that a chat template may ask for")


def _generation_tag() -> Any:
    """`{% generation %}..{% endgeneration %}` marks the assistant's words for training; here it only shows them."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return Generation
