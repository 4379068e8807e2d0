"""Chat templates by the hundred, put together at random from ways of writing what published templates write.

`python tests/chat_templates.py MODEL.gguf > tests/data/chat_templates.json` records what llama.cpp makes of them; it
needs `pip install xllamacpp` (a prebuilt llama.cpp with its server), and any small model whose file says
`add_bos_token` false and whose bos is `<s>`, eos `</s>`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import urllib.request
import zlib
from typing import Any

SEED, COUNT = 15, 260
USER, SYSTEM, ANSWER, MORE = "tell me about rivers", "Be brief & kind.", "They flow.", "and   lakes?"
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "user": [{"role": "user", "content": USER}],
    "system": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}],
    "turns": [
        {"role": "user", "content": USER},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": MORE},
    ],
}

TEXT_READERS = [  # of c, a text
    "{{ c }}",
    "{{ c | trim }}",
    "{{ c.strip() + '\\n' }}",
    "{{ '' ~ c ~ '' }}",
    "{{ c | tojson }}",
    "{{ c | upper }}",
    "{{ c | lower | capitalize }}",
    "{{ c.split('</think>')[-1] }}",
    "{{ c | replace('lakes', 'lakes') }}",
    "{{ c[:100000000] }}",
    "{{ 'a: ' + c if c else '' }}",
    "{{ '%s!' | format(c) }}",
    "{% set text = c %}{{ text }}",
    "{% for letter in c %}{{ letter }}{% endfor %}",
    "{{ [c, ''] | join(' ') }}",
    "{{ {'text': c}['text'] }}",
]
PART_READERS = [  # of c, a list of parts
    "{{ c[0].text }}",
    "{{ c[0]['text'] }}",
    "{{ c[-1]['text'] | trim }}",
    "{{ (c | first).text }}",
    "{{ (c | last)['text'] }}",
    "{% for p in c %}{{ p.text }}{% endfor %}",
    "{% for p in c %}{{ p['text'] }}{% endfor %}",
    "{% for p in c %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}",
    "{% for p in c if p['type'] == 'text' %}{{ p['text'] | trim }}{% endfor %}",
    "{% for p in c %}{% if p is mapping %}{{ p.text }}{% endif %}{% endfor %}",
    "{% for p in c | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}",
    "{{ (c | selectattr('type', 'equalto', 'text') | list)[0].text }}",
    "{{ c | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') }}",
    "{{ c | map(attribute='text') | join('\\n') }}",
    "{% for p in c %}{% if p.type == 'image' %}<image>{% elif 'text' in p %}{{ p.text }}{% endif %}{% endfor %}",
    "{% set ns2 = namespace(t='') %}{% for p in c %}{% set ns2.t = ns2.t ~ p.text %}{% endfor %}{{ ns2.t }}",
]
CHOICES = [  # between {text} and {parts}
    "{% if c is string %}{text}{% else %}{parts}{% endif %}",
    "{% if c is not string %}{parts}{% else %}{text}{% endif %}",
    "{% if c is iterable and c is not string %}{parts}{% else %}{text}{% endif %}",
    "{% if c is string %}{text}{% elif c is sequence %}{parts}{% endif %}",
    "{% if c is mapping %}x{% elif c is string %}{text}{% else %}{parts}{% endif %}",
]
CONTENT = ["m.content", "m['content']", "m.get('content')"]
SYSTEMS = ["loop", "loop", "refused", "ignored", "front", "merged"]
BOS = ["", "", "{{ bos_token }}", "{{- bos_token -}}", "{% if bos_token is defined %}{{ bos_token }}{% endif %}"]
EXTRAS = [
    "",
    "{% set ms = 1735689600000 %}{{ ms // 1000 }} ",
    "{{ 2 ** 53 }} {{ 9007199254740993 - 1 }} ",
    "{% set o = namespace(t=1735689600000) %}{{ o.t }} ",
    "{% macro at(t) %}{{ t + 1 }}{% endmacro %}{{ at(1735689600000) }} ",
    "{{ {'max': 9007199254740991, 'min': -9007199254740991} | tojson }} ",
    "{{ 1735689600000 * 2 > 3000000000000 }} ",
    "{{ '1735689600' | int + 1 }} {{ 5 % 3 }} ",  # there, int has 32 bits and % the sign of C
    "{% if tools is defined and tools %}{{ tools | tojson }}{% endif %}",
    "{% if not tools is defined %}{% set tools = none %}{% endif %}{% if tools is not none %}x{% endif %}",
    "{% if tools %}{{ tools | length }}{% endif %}",
    "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "{{ strftime_now('%Y-%m-%d') | length }} ",
    "{% if documents is defined %}{{ documents }}{% endif %}",
    "{% set default = 'x' %}{{ nothing | default(default) }}",
    "{{ [3, 1, 2] | sort | join(',') }} ",
]


def template(number: int) -> str:
    """One of the templates, always the same for its number."""
    pick = random.Random(SEED * 1000 + number)
    show, macro = _reader(pick), ""
    read = f"{{% set c = {pick.choice(CONTENT)} %}}" + show
    if pick.random() < 0.25:
        name = "c" if pick.random() < 0.5 else "content"
        macro = f"{{% macro show({name}) %}}{'' if name == 'c' else '{% set c = content %}'}{show}{{% endmacro %}}"
        read = f"{{{{ show({pick.choice(CONTENT)}) }}}}"
    before, around = _system(pick.choice(SYSTEMS), read)
    end = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}" if pick.random() < 0.7 else ""
    eos = "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}" if pick.random() < 0.3 else ""
    loop = "{% for m in talk %}" + around.replace("READ", read + eos) + "{% endfor %}"
    start = "{% set talk = messages %}"
    return pick.choice(BOS) + pick.choice(EXTRAS) + macro + start + before + loop + end


def _reader(pick: random.Random) -> str:
    text, parts = pick.choice(TEXT_READERS), pick.choice(PART_READERS)
    both = pick.choice(CHOICES).replace("{text}", text).replace("{parts}", parts)
    return pick.choice([text, parts, both])


def _system(way: str, read: str) -> tuple[str, str]:
    """What stands before the loop over messages, and what is in it around READ."""
    first = "{% if messages[0].role == 'system' %}"
    shown = "<|{{ m.role }}|>READ\n"
    if way == "refused":
        return first + "{{ raise_exception('no system role') }}{% endif %}", shown
    if way == "ignored":
        return "", "{% if m.role != 'system' %}" + shown + "{% endif %}"
    if way == "front":
        head = first + "{% set m = messages[0] %}[SYS]" + read + "[/SYS]{% set talk = messages[1:] %}{% endif %}"
        return head, shown
    if way == "merged":
        head = first + "{% set sys = messages[0] %}{% set talk = messages[1:] %}{% endif %}"
        inside = "{% if loop.first and sys is defined %}{% set one = m %}{% set m = sys %}" + read + "\n"
        return head, "<|{{ m.role }}|>" + inside + "{% set m = one %}{% endif %}READ\n"
    return "", shown


def recorded(model: str) -> dict[str, Any]:
    """llama.cpp's prompt for each template and conversation, null where it has none; a process for each template."""
    answers = {}
    for number in range(COUNT):
        command = [sys.executable, __file__, model, str(number)]
        said = subprocess.run(command, timeout=60, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        answers[str(number)] = {"crc": zlib.crc32(template(number).encode()), **json.loads(said)}
    return answers


def prompts_of(model: str, number: int) -> dict[str, str | None]:
    """llama.cpp's prompts of one template."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.chat_template, params.use_jinja = model, template(number), True
    params.n_ctx, params.warmup, params.port = 64, False, 0
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:  # it does not start with a template that fails
        return dict.fromkeys(CONVERSATIONS)
    return {name: _asked(server.listening_address, talk) for name, talk in CONVERSATIONS.items()}


def _asked(address: str, messages: list[dict[str, str]]) -> str | None:
    body = json.dumps({"messages": messages}).encode()
    request = urllib.request.Request(address + "/apply-template", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            prompt: str = json.load(answer)["prompt"]
            return prompt
    except OSError:  # the template failed
        return None


if __name__ == "__main__":
    model, *one = sys.argv[1:]
    print(json.dumps(prompts_of(model, int(one[0])) if one else recorded(model), indent=0), flush=True)
    os._exit(0)  # the server's own end may wait for ever
