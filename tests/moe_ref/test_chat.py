"""Chat templates render as Hugging Face's engine renders them, and a hostile one gets no further than an error."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import pytest
from conftest import shared_files

from moe_ref.chat import MAX_TEXT, ChatTemplateError, render_chat
from moe_ref.gguf import open_gguf

HELLO = [{"role": "user", "content": "Hi"}]


def metadata(template: Any, **keys: Any) -> dict[str, Any]:
    tokens = {"tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"], "tokenizer.ggml.bos_token_id": 1}
    return {"tokenizer.chat_template": template, **tokens, "tokenizer.ggml.eos_token_id": 2, **keys}


def render(template: str, messages: Any = (), *args: Any, **kw: Any) -> str:
    return render_chat(metadata(template), messages, *args, **kw)


CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def test_chatml_renders_with_and_without_a_generation_prompt() -> None:
    talk = [{"role": "system", "content": " Be kind. "}, *HELLO]
    expected = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(CHATML, talk) == expected + "<|im_start|>assistant\n"
    assert render(CHATML, talk, add_generation_prompt=False) == expected


def test_blocks_leave_no_newline_and_no_indent() -> None:
    assert render("{% if true %}\n    a\n    {% endif %}\nb\n") == "    a\nb"


def test_special_tokens_come_from_the_file_and_may_be_overridden() -> None:
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}"
    assert render(template) == "<s>|</s>|"
    assert render(template, bos_token="B", pad_token="P") == "B|</s>|P"
    assert render_chat({"tokenizer.chat_template": template}, []) == "||"
    out_of_range = metadata(template) | {"tokenizer.ggml.bos_token_id": 99}
    assert render_chat(out_of_range, []) == "|</s>|"


def test_keywords_reach_the_template_and_tools_choose_the_tool_template() -> None:
    assert render("{{ enable_thinking }} {{ tools is none }}", enable_thinking=False) == "False True"
    both = metadata("plain") | {"tokenizer.chat_template.tool_use": "with {{ tools[0].name }}"}
    assert (render_chat(both, []), render_chat(both, [], tools=[{"name": "f"}])) == ("plain", "with f")
    assert render_chat(metadata("plain"), [], tools=[{"name": "f"}]) == "plain"


def test_tojson_writes_json_as_it_is() -> None:
    messages = [{"role": "user", "content": {"b": "é<&'", "a": [1, None, True]}}]
    assert render("{{ messages[0].content | tojson }}", messages) == '{"b": "é<&\'", "a": [1, null, true]}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}") == '{\n  "a": 2,\n  "b": 1\n}'


def test_loop_controls_generation_tags_and_the_date_are_there() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c", HELLO) == "abHic"
    assert render("{{ date_string }}").split() == render("{{ strftime_now('%d %b %Y') }}").split()
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


@pytest.mark.parametrize("path", shared_files("data/golden/vocab/*qwen2.gguf", "data/golden/vocab/*phi-3.gguf"))
def test_templates_in_published_files_render(path: Any) -> None:
    with open_gguf(path) as gguf:
        prompt = render_chat(gguf.metadata, HELLO)
    chatml = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    expected = {"qwen2": chatml + "<|im_start|>assistant\n", "phi-3": "<s><|user|>\nHi<|end|>\n<|assistant|>\n"}
    assert prompt == expected[path.name.removeprefix("ggml-vocab-").removesuffix(".gguf")]


# ---- what can go wrong


@pytest.mark.parametrize("keys", [{}, {"tokenizer.chat_template": ""}, {"tokenizer.chat_template": 7}])
def test_a_missing_template_is_named_by_its_key(keys: dict[str, Any]) -> None:
    with pytest.raises(ChatTemplateError, match=r"^tokenizer\.chat_template is .*no chat format"):
        render_chat(keys, HELLO)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "line 1: refused: roles must alternate"),
        ("a\n\n{% if %}", "line 3: TemplateSyntaxError"),
        ("a\n{{ messages[0].nothing.more }}", "line 2: UndefinedError: .*has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{% include 'x' %}", "TypeError: no loader"),
        ("{{ messages | nosuch }}", "No filter named 'nosuch'"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ (" * 1 + "(" * 5000, "(TemplateSyntaxError|RecursionError|MemoryError)"),
    ],
)
def test_errors_in_a_template_name_the_key_and_the_line(template: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"^tokenizer.chat_template.*{message}"):
        render(template, HELLO)


@pytest.mark.parametrize("messages", ["Hi", [HELLO], [{"content": "Hi"}], [{"role": 3}], None, [*HELLO, "x"]])
def test_messages_of_a_wrong_shape_are_refused(messages: Any) -> None:
    with pytest.raises(ChatTemplateError, match=r"^messages.*expected a (list|dict)"):
        render(CHATML, messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ (''|attr('__class__'))['__mro__'] }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
    ],
)
def test_the_inside_of_objects_is_out_of_reach(template: str) -> None:
    messages = [dict(message) for message in HELLO]
    try:
        text = render(template + "{{ messages[0].content }}", messages)
    except ChatTemplateError:
        text = ""
    assert "object" not in text and "module" not in text and "type" not in text, text
    assert messages == HELLO


DOUBLE = "{%% set ns = namespace(s='ab', l=[1]) %%}{%% for i in range(64) %%}{%% set %s %%}{%% endfor %%}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * 'a' }}",
        "{{ ([0] * 100000000)[0] }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 9 ** 99999999 }}",
        DOUBLE % "ns.s = ns.s + ns.s",
        DOUBLE % "ns.s = ns.s ~ ns.s",
        DOUBLE % "ns.s = ns.s * 2",
        DOUBLE % "ns.l = ns.l + ns.l",
        "{% set ns = namespace(n=3) %}{% for i in range(64) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ 'a'.zfill(10000000000) }}",
        "{% for i in range(10000000000) %}{% endfor %}",
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a' | indent(10000000000, true) }}",
        "{{ ['a'] | map('center', 10000000000) | list }}",
        "{{ [1] | batch(10000000000, 0) | list }}",
        "{{ [1] | slice(10000000000) | list }}",
        "{{ 1.5 | round(10000000000, 'ceil') }}",
        "{{ [1] | tojson(indent=10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '%.10000000000f' | format(1.5) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=10000000000) }}",
        "{{ '{x:>10000000000}'.format_map({'x': 1}) }}",
        "{{ (7).to_bytes(10000000000, 'big') }}",
        "{{ (7).to_bytes(length=10000000000, byteorder='big') }}",
        "{{ ('\t' * 100000).expandtabs(100000) }}",
        "{{ 'a'.encode().ljust(10000000000) }}",
        "{% for i in range(100000) %}{{ 'x' * 10000 }}{% endfor %}",
    ],
)
def test_huge_results_are_refused_before_they_exist(template: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"OverflowError|SecurityError"):
        render(template, HELLO)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("1735689600000 // 1000", "1735689600"),
        ("1735689600000 * 0.001", "1735689600.0"),
        ("1735689600000 + 0.5", "1735689600000.5"),
        ("2 ** 53 - 1", "9007199254740991"),
        ("2 ** -20000", "0.0"),
        ("-9007199254740993 % 1000", "7"),
        ("namespace(at=1735689600000).at", "1735689600000"),
        ("dict(at=1735689600000)['at']", "1735689600000"),
        ("[1735689600000, -9007199254740993] | tojson", "[1735689600000, -9007199254740993]"),
        ("{'maximum': 9223372036854775807} | tojson(indent=1)", '{\n "maximum": 9223372036854775807\n}'),
        ("'abc'[:100000000]", "abc"),
        ("'abc'.find('c', 0, 1735689600000)", "2"),
        ("'a,b'.split(',', 1735689600000) | length", "2"),
        ("'aa'.replace('a', 'b', 1735689600000)", "bb"),
        ("{}.get('at', 1735689600000)", "1735689600000"),
        ("range(1735689600000, 1735689600002) | list", "[1735689600000, 1735689600001]"),
        ("'%d ms' % 1735689600000", "1735689600000 ms"),
        ("'1735689600000 %s' | format(1735689600000)", "1735689600000 1735689600000"),
        ("'{} {:,} {:>14}'.format(1735689600000, 1735689600000, 1)", "1735689600000 1,735,689,600,000              1"),
        ("1735689600000 | round(2)", "1735689600000"),
        ("1735689600000 | center(15)", " 1735689600000 "),
        ("'1735689600000' | int // 1000", "1735689600"),
        ("nothing | default(1735689600000)", "1735689600000"),
        ("'some words' | truncate(1735689600000)", "some words"),
        ("[1735689600000, 1] | sum", "1735689600001"),
        ("1735689600000 > 16777217", "True"),
        ("cycler(1735689600000, 2).next()", "1735689600000"),
        ("(1735689600000).bit_length()", "41"),
    ],
)
def test_large_values_are_no_sizes(expression: str, expected: str) -> None:
    assert render("{{ " + expression + " }}") == expected
    macro = "{% macro show(value) %}{{ value }}{% endmacro %}"
    assert render(macro + "{{ show(" + expression + ") }}") == expected


def test_large_but_sensible_prompts_pass() -> None:
    long = "word " * (MAX_TEXT // 10)
    assert render("{{ messages[0].content ~ '!' }}", [{"role": "user", "content": long}]) == long + "!"
    assert (
        render("{{ '-' * 8 ~ 2 ** 10 ~ 7 * 6 ~ ([1] + [2]) ~ undefined ~ '%5.1f' % 2 }}") == "--------102442[1, 2]  2.0"
    )


def test_without_jinja_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ChatTemplateError, match="pip install 'jinja2"):
        render(CHATML)
