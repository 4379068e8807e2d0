"""Jinja's sandbox for chat templates, which are programs written by strangers.

A template has no access to files, modules, or the inside of objects, and cannot change the messages. Sizes are bounded,
values are not: a number may be a time in milliseconds, so only one that becomes a length is looked at. Bounded are
`range` (100 000), the results of + * ** ~, widths given to methods, filters and formats, the output, the depth of
recursion. Not bounded: the time that nested loops take, and the memory that `replace`, `join` and `translate` take; for
untrusted files, limit the process.

Extensions to Jinja are those of Hugging Face transformers, for which templates are written: `raise_exception`,
`strftime_now`, `tojson`, loop controls, the `generation` tag (source: transformers/utils/chat_template_utils.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache, lru_cache, wraps
from typing import Any

MAX_TEXT = 2**24  # characters of a prompt, and of any text or list that an operator makes
MAX_BITS = 4096  # of an integer that an operator makes
MAX_INDENT = 256  # spaces a level of JSON
WIDE_METHODS = ("center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill")  # their integer is a size
WIDE_FILTERS = {"batch": MAX_TEXT, "center": MAX_TEXT, "indent": MAX_TEXT, "round": MAX_BITS, "slice": MAX_TEXT}
WIDTH = re.compile("[0-9]+")
PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*([0-9*]*(?:\.[0-9*]*)?)")  # width and precision of a field


class ChatTemplateError(ValueError):
    """A chat template that is missing, wrong, refuses the messages, or asks for what the sandbox forbids."""


@lru_cache(maxsize=8)
def compiled(template: str) -> Any:
    """The template, ready to render; raises what Jinja raises for one that is wrong."""
    return _environment().from_string(template)


@cache
def absent(name: str) -> Any:
    """A value that is not defined and is none: templates ask for what they were not given in both ways."""
    return _absent_kind()(name=name)


@cache
def _absent_kind() -> Any:
    from jinja2 import Undefined

    class Absent(Undefined):
        __slots__ = ()
        __hash__ = Undefined.__hash__

        def __eq__(self, other: Any) -> bool:
            return other is None or super().__eq__(other)

    return Absent


@cache
def _environment() -> Any:
    extensions = ["jinja2.ext.loopcontrols", _generation_tag()]
    environment = _sandbox()(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    for name, limit in WIDE_FILTERS.items():
        environment.filters[name] = _bounded_filter(name, environment.filters[name], limit)
    environment.filters["format"] = lambda text, *args, **kw: environment.call_binop(None, "%", str(text), kw or args)
    environment.filters["tojson"] = _tojson
    environment.tests["none"] = lambda value: value is None or isinstance(value, _absent_kind())
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    del environment.globals["lipsum"]  # random filler text of any length
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, unlike Jinja's own filter, which escapes it for HTML."""
    _check_size("indent", indent if isinstance(indent, int) else 0, MAX_INDENT)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(message)


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


# ---- bounds


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
        intercepted_binops = frozenset(["+", "*", "**", "%"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            _check_call(__self, getattr(__obj, "__wrapped__", __obj), args, kwargs)
            return super().call(__context, __obj, *args, **kwargs)

        def concatenated(self, parts: tuple[Any, ...]) -> str:
            texts = [str(part) for part in parts]
            _check_size("~", sum(map(len, texts)))
            return "".join(texts)

    return Sandbox


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would have more than MAX_TEXT characters or elements, or MAX_BITS bits."""
    lengths = [len(x) if hasattr(x, "__len__") else None for x in (left, right)]
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(0, right) if operator == "**" else left.bit_length() + right.bit_length()
        _check_size(f"bits of {operator}", bits if operator != "%" else 0, MAX_BITS)
    elif operator == "%" and isinstance(left, str | bytes):
        _check_percent(left if isinstance(left, str) else left.decode("latin-1"), right)
    elif operator == "+" and None not in lengths:
        _check_size("+", sum(length or 0 for length in lengths))
    elif operator == "*":
        for length, times in zip(lengths, (right, left), strict=True):
            _check_size("*", (length or 0) * (times if isinstance(times, int) else 0))


def _check_percent(text: str, values: Any) -> None:
    """The widths of `text % values`; one written as * is among the values."""
    widths = PERCENT.findall(text)
    starred = values if isinstance(values, tuple) and any("*" in width for width in widths) else ()
    for size in (*WIDTH.findall(" ".join(widths)), *(value for value in starred if isinstance(value, int))):
        _check_size("the width of a format", int(size))


def _check_call(environment: Any, method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The sizes that a method of a text or a number is asked for; other calls are given values."""
    name, owner = getattr(method, "__name__", ""), getattr(method, "__self__", None)
    if name in WIDE_METHODS and isinstance(owner, str | bytes | int):
        size = next((value for value in (*args, *kwargs.values()) if isinstance(value, int)), 0)
        _check_size(name, size * (len(owner) if name == "expandtabs" and not isinstance(owner, int) else 1))
    elif name in ("format", "format_map") and isinstance(owner, str):
        values = args[0] if name == "format_map" and args else kwargs
        _checking_formatter()(environment).vformat(owner, args, values)


@cache
def _checking_formatter() -> Any:
    from jinja2.sandbox import SandboxedFormatter

    class Checking(SandboxedFormatter):
        def format_field(self, value: Any, format_spec: str) -> str:
            for size in WIDTH.findall(format_spec) if isinstance(value, str | int | float) else ():
                _check_size("the width of a format", int(size))
            return str(super().format_field(value, format_spec))

    return Checking


def _bounded_filter(name: str, function: Callable[..., Any], limit: int) -> Callable[..., Any]:
    """A filter whose first integer behind the filtered value is a size."""

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_size(name, next((x for x in (*args[1:], *kwargs.values()) if isinstance(x, int)), 0), limit)
        return function(*args, **kwargs)

    return bounded


def _check_size(what: str, size: int, limit: int = MAX_TEXT) -> None:
    if abs(size) > limit:
        raise OverflowError(f"{what}: {size} is more than the {limit} that a chat template may ask for")
