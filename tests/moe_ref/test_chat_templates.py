"""No template loses a message silently: a prompt shows every text, equal to llama.cpp's where that does, or fails."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CONVERSATIONS, COUNT, template
from conftest import shared_files

from moe_ref.chat import ChatTemplateError, render_chat
from moe_ref.gguf import open_gguf

LLAMA_CPP = json.loads((Path(__file__).parents[1] / "data" / "chat_templates.json").read_text())
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
    "tokenizer.ggml.token_type": [2, 3, 3],
    "tokenizer.ggml.add_bos_token": False,
}
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "tell me"}


def render(source: str, messages: Any) -> str:
    return render_chat(VOCABULARY | {"tokenizer.chat_template": source}, messages)


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


def shows_all(prompt: str, messages: Any) -> bool:
    return all(letters(message["content"]) in letters(prompt) for message in messages)


def test_generated_templates_show_every_text_and_equal_llama_cpp_where_it_shows_them_too() -> None:
    equal = 0
    for number in range(COUNT):
        source, answers = template(number), LLAMA_CPP[str(number)]
        assert zlib.crc32(source.encode()) == answers["crc"], "the templates have changed: record them again"
        for name, talk in CONVERSATIONS.items():
            prompt, theirs = render(source, talk), answers[name]
            assert shows_all(prompt, talk), (source, prompt)
            if theirs is not None and shows_all(theirs, talk):
                assert prompt == theirs, source
                equal += 1
    assert COUNT >= 200 and equal == 577  # the others: llama.cpp fails (167), or loses a text (36)


@pytest.mark.parametrize("path", shared_files("data/reports/chat_template_*.gguf"))
def test_the_reported_files_show_the_text(path: Path) -> None:
    with open_gguf(path) as file:
        prompt = render_chat(file.metadata, [{"role": "user", "content": "tell me about rivers"}])
    behind = " at 1735689600000" if "integer" in path.name else ""
    assert prompt == "<|user|>tell me about rivers" + behind


LOOP = "{% for m in messages %}"
DEAF = [
    "hello",
    LOOP + "<|{{ m.role }}|>{% endfor %}",
    LOOP + "{{ m.contents }}{% endfor %}",
    LOOP + "{{ m.content | length }}{% endfor %}",
    LOOP + "{{ m.content[0] }}{% endfor %}",
    LOOP + "{% for p in m.content %}{{ p.value }}{% endfor %}{% endfor %}",
    "{% if messages[-1].content is none %}{{ messages[-1].content }}{% endif %}",
]


@pytest.mark.parametrize("source", DEAF)
def test_a_template_that_shows_the_text_in_no_form_is_refused_in_one_line(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"messages\[0\] \(role 'user'\) leaves no trace.*; use a ") as refused:
        render(source, [USER])
    assert "\n" not in str(refused.value)
    with pytest.raises(ChatTemplateError, match="leaves no trace"):  # though it is in the template's own words
        render(source + "tell me", [USER])


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_a_message_of_blanks_may_leave_no_trace(blank: str) -> None:
    trimmed = LOOP + "<|{{ m.role }}|>{% if m.content | trim %}{{ m.content }}{% endif %}{% endfor %}"
    assert render(trimmed, [{"role": "user", "content": blank}]) == "<|user|>"
    assert render("hello", [{"role": "user", "content": blank}]) == "hello"
    parts = LOOP + "{{ m.content[0].text }};{% endfor %}"
    assert render(parts, [{"role": "system", "content": blank}, USER]) == f"{blank};tell me;"
    assert render(parts, [{"role": "user", "content": blank}]) == f"{blank};"


def test_a_system_message_is_merged_where_the_template_refuses_ignores_or_looks_past_it() -> None:
    say = "{{ m.content }};{% endfor %}"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + LOOP + say
    alternates = LOOP + "{% if (m.role == 'user') != loop.first %}{{ raise_exception('x') }}{% endif %}" + say
    ignores = LOOP + "{% if m.role != 'system' %}{{ m.content }};{% endif %}{% endfor %}"
    looks = LOOP + "{% if m.content and m.role == 'user' %}{{ m.content }};{% endif %}{% endfor %}"
    parts = LOOP + "{% if m.role == 'user' %}{{ m.content[0].text }};{% endif %}{% endfor %}"
    for source in (refuses, alternates, ignores, looks, parts):
        assert render(source, [SYSTEM, USER]) == "Be brief.\ntell me;", source
    for source in (ignores, looks, parts):
        with pytest.raises(ChatTemplateError, match=r"messages\[0\] \(role 'system'\).*into the user's message"):
            render(source, [SYSTEM])
    with pytest.raises(ChatTemplateError, match="refused: no"):
        render(refuses, [SYSTEM])


def test_system_and_user_may_be_read_in_different_forms() -> None:
    user = "{{ messages[1].content[0].text }}"
    assert render("{{ messages[0].content }}|" + user, [SYSTEM, USER]) == "Be brief.|tell me"
    assert render("{{ messages[0].content[0].text }}|{{ messages[1].content }}", [SYSTEM, USER]) == "Be brief.|tell me"


def test_parts_given_become_a_text_where_the_template_wants_one() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    for read, expected in {
        "m.content": "one\ntwo",
        "m.content | tojson": '"one\\ntwo"',
        "'<' + m.content + '>'": "<one\ntwo>",
        "m.content[0].text ~ m.content[1].text": "onetwo",
        "m.content | map(attribute='text') | join('+')": "one+two",
    }.items():
        assert render(LOOP + "{{ " + read + " }}{% endfor %}", [{"role": "user", "content": parts}]) == expected
    with pytest.raises(ChatTemplateError, match="leaves no trace"):  # half of it is lost
        render(LOOP + "{{ m.content[1].text }}{% endfor %}", [{"role": "user", "content": parts}])


def test_what_a_template_refuses_in_every_form_is_its_own_message() -> None:
    strict = (
        LOOP
        + "{% if m.role != 'user' %}{{ raise_exception('roles: ' ~ m.role) }}{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ChatTemplateError, match="refused: roles: assistant"):
        render(strict, [{"role": "assistant", "content": "x"}, USER])
    only = "{% if messages[0].content != 'tell me' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    assert render(only, [USER]) == "tell me"  # though it refuses what it is tried with


def test_tools_are_absent_in_each_way_of_asking() -> None:
    for asked in ("tools is defined", "tools is not none", "tools", "documents is defined", "tools != none"):
        assert render("{% if " + asked + " %}x{% endif %}", []) == "", asked
