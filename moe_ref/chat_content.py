"""The same messages in the form that a chat template reads: a template that cannot read one form loses its text.

Content is a text, or a list of parts ({"type": "text", "text": ...}). Some templates read only one of the two, and find
nothing in the other, mostly without an error; some leave out or refuse a system message. So each form is tried with
marks in place of the texts, until every mark is in the prompt:

1. as given, 2. all parts, 3. all texts, 4. parts only where the mark was lost,
5. and 6. the system message merged into the message behind it, as texts and as parts.

Source: llama.cpp, common/chat.cpp and common/jinja/caps.cpp, which choose among 1, 2, 3 and 5 by what a template reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Messages = Sequence[Message]
Render = Callable[[Messages], str]
Lost = set[int] | None  # the places of messages whose marks are not in the prompt; None: the template failed
PART_AS_CODE = re.compile(r"""(['"])text\1: ?(['"])zqx.*?xqz\2""")  # a list was written where its text should be


class LostMessageError(ValueError):
    """A message whose text is nowhere in the prompt, in whatever form the template is given it."""


def render_whole(render: Render, messages: Messages) -> str:
    """``render(messages)`` in the first form that shows every text. A message of nothing but blanks may be left out.

    Where no form does, raises what ``render`` raises for the messages as given, else LostMessageError.
    """
    marked = [_with_marks(message, _marks(message, i)) for i, message in enumerate(messages)]
    written = {i for i, message in enumerate(messages) if _text(message).strip() and not message.get("tool_calls")}
    wanted = {i: _marks(messages[i], i) for i in written or range(len(messages))}
    lost = _lost(render, marked, wanted)
    if lost == set():
        return render(messages)
    tried = [marked]
    for form in OTHER_FORMS:
        if form(marked, lost) not in tried and _lost(render, form(marked, lost), wanted) == set():
            return render(form(messages, lost))
        tried.append(form(marked, lost))
    prompt = render(messages)
    if lost is None:  # the template refuses the marks, but not the texts
        lost = {i for i in written if _letters(_text(messages[i])) not in _letters(prompt)}
    for i in sorted(lost & written):
        raise LostMessageError(_lost_message(i, messages[i]["role"]))
    return prompt


def _lost_message(i: int, role: str) -> str:
    remedy = "put its text into the user's message" if role == "system" else "use a plain prompt, or another template"
    return f"messages[{i}] (role {role!r}) leaves no trace in the prompt, as a text or as a list of parts; {remedy}"


# ---- marks


def _marks(message: Message, place: int) -> list[str]:
    """One for each text of the message, which is found again after trim, upper, title, escape, tojson, urlencode."""
    return [f"zqx{place}y{part}xqz" for part in range(len(_texts_of(message)))]


def _with_marks(message: Message, marks: Sequence[str]) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": marks[0]}
    if not isinstance(content, list):
        return message
    rest = iter(marks)
    return {**message, "content": [{**part, "text": next(rest)} if _is_text(part) else part for part in content]}


def _lost(render: Render, marked: Messages, wanted: Mapping[int, list[str]]) -> Lost:
    try:
        prompt = render(marked).casefold()
    except (OverflowError, MemoryError, RecursionError):  # too much for once, not to be tried again
        raise
    except Exception:  # whatever a stranger's program raises
        return None
    if any(isinstance(message.get("content"), list) for message in marked):
        prompt = PART_AS_CODE.sub("", prompt)
    return {i for i, marks in wanted.items() if not all(mark in prompt for mark in marks)}


# ---- texts of a message


def _texts_of(message: Message) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content if _is_text(part)] if isinstance(content, list) else []


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _text(message: Message) -> str:
    return "\n".join(_texts_of(message))


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.casefold()))


# ---- forms: messages as given and those that were lost then -> messages


def _parts(messages: Messages, lost: Lost = None) -> list[Message]:
    """Lists of parts, for all or only for those that were lost."""
    return [_as_parts(m) if lost is None or i in lost else m for i, m in enumerate(messages)]


def _as_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _as_text(message: Message) -> Message:
    """Parts joined by newlines, if all are texts."""
    content = message.get("content")
    if not isinstance(content, list) or not all(map(_is_text, content)):
        return message
    return {**message, "content": _text(message)}


def _merged(messages: Messages) -> list[Message]:
    """A first message of the role system put before the text of the next one, with a newline."""
    texts = [_as_text(message) for message in messages]
    if len(texts) < 2 or texts[0]["role"] != "system":
        return texts
    system, behind = (message.get("content") for message in texts[:2])
    if not isinstance(system, str) or not isinstance(behind, str):
        return texts
    return [{**texts[1], "content": f"{system}\n{behind}"}, *texts[2:]]


OTHER_FORMS: tuple[Callable[[Messages, Lost], list[Message]], ...] = (
    lambda messages, lost: _parts(messages),
    lambda messages, lost: [_as_text(message) for message in messages],
    _parts,
    lambda messages, lost: _merged(messages),
    lambda messages, lost: _parts(_merged(messages)),
)
