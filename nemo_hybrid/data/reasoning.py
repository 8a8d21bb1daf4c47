"""Reasoning of the assistant: changing it in a message, leaving it out of what is learnt.

It is the field reasoning_content, and in text every block from <think> to the next </think>. Where
prompts open the thinking, answers begin inside of it; data made with them has a </think> that
nothing opens. It ends reasoning where it begins a line; elsewhere somebody mentions it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from nemo_hybrid.data.chat import END_OF_THINKING, THINK, Message, Span

_BLOCK = re.compile(f"{THINK}.*?(?={END_OF_THINKING})", re.DOTALL)


def change_reasoning(message: Message, change: Callable[[str], str]) -> Message:
    """The message with other reasoning, in its own field and in the content; without if empty."""
    content, inside = message.get("content", ""), None
    if reasoning := message.get("reasoning_content"):
        inside = False
        message = {**message, "reasoning_content": change(reasoning)}
        if not message["reasoning_content"]:
            del message["reasoning_content"]
    new, at = "", 0
    for begin, end in _blocks(content, (0, len(content)), inside):
        new += content[at:begin]
        at = end + len(END_OF_THINKING)
        block = content[begin:end]
        opening = f"{THINK}\n" if block.startswith(THINK) else ""
        if changed := change(block.removeprefix(THINK).strip()):
            new += f"{opening}{changed}\n{END_OF_THINKING}"
        elif not new or new[-1].isspace():
            at = len(content) - len(content[at:].lstrip())
    return {**message, "content": new + content[at:]} if at else message


def learnt_parts(text: str, span: Span, masked: bool) -> list[Span]:
    """Parts of an answer in a rendered text: without its reasoning, or if that is not masked,
    without every </think> that ends some."""
    start, stop = span
    before = text[:start].rstrip()
    inside = True if before.endswith(THINK) else False if before.endswith(END_OF_THINKING) else None
    parts = []
    for begin, end in _blocks(text, span, inside):
        parts.append((start, begin if masked else len(text[:end].rstrip())))
        start = end + len(END_OF_THINKING)
    return [*parts, (start, stop)]


def _blocks(text: str, span: Span, inside: bool | None) -> list[Span]:
    """From where to which </think> each block of reasoning reaches. inside: whether the span begins
    in one; None: that is not known."""
    start, stop = span
    end, opening = text.find(END_OF_THINKING, start, stop), text.find(THINK, start, stop)
    if inside is None and not 0 <= opening < end:
        inside = end == start or (end > 0 and text[end - 1] == "\n")
    first = [(start, end)] if inside and end >= 0 else []
    after = end if first else start
    return first + [m.span() for m in _BLOCK.finditer(text, after, stop)]
