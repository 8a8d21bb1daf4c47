"""Reasoning in answers: where it is, and whether it is whole.

Reasoning is the field reasoning_content, and in text every block from <think> to the next </think>.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from nemo_hybrid.data.sources import BadRecord

Message = dict[str, Any]
Span = tuple[int, int]
"""From and to which character."""

THINK, END_OF_THINKING = "<think>", "</think>"
THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates are told whether to ask for reasoning: of Qwen and Nemotron, and of
DeepSeek and Granite."""
_BLOCK = re.compile(f"{THINK}.*?(?={END_OF_THINKING})", re.DOTALL)
TAG = re.compile(f"({THINK}|{END_OF_THINKING})")
_FAULT = "reasoning"


def settle_reasoning(message: Message) -> Message:
    """An answer whose text begins with reasoning that its prompt opened, or that reasoning_content
    holds too, with that in reasoning_content alone.

    What a model writes behind a prompt that opened the thinking ends it with a </think> that
    nothing opened; a template has to be told which part of it is reasoning.
    """
    known, content = message.get("reasoning_content", "").strip(), message.get("content", "")
    before, tag, after = content.partition(END_OF_THINKING)
    begins_line = not before.strip() or before.rstrip(" \t").endswith("\n")
    raw = THINK not in before and begins_line
    thought = before.strip() if raw else before.strip().removeprefix(THINK).strip()
    if not tag or (thought != known if known else not raw):
        return message
    message = {**message, "content": after.lstrip("\r\n")}
    return {**message, "reasoning_content": thought} if thought else message


def check_reasoning(message: Message) -> None:
    """Raise BadRecord for an answer whose reasoning is not whole, or that ends with it."""
    content = message.get("content", "")
    check_tags(content)
    if THINK in content and message.get("reasoning_content"):
        raise BadRecord("there is reasoning in a field and other in the text", _FAULT)
    thinks = message.get("reasoning_content", "").strip() or THINK in content
    answer = change_reasoning({"content": content}, lambda _: "")["content"]
    if thinks and not answer.strip() and not message.get("tool_calls"):
        raise BadRecord("the reasoning was cut off: no answer follows it", _FAULT)


def check_tags(text: str) -> None:
    """Raise BadRecord if thinking is opened twice, left open, or closed where it is not open."""
    inside = False
    for tag in TAG.findall(text):
        if inside == (tag == THINK):
            what = f"opens {THINK} twice" if inside else f"holds a {tag} that nothing opened"
            raise BadRecord(f"the answer {what}", _FAULT)
        inside = not inside
    if inside:
        raise BadRecord(f"the answer leaves {THINK} open at its end", _FAULT)


def change_reasoning(message: Message, change: Callable[[str], str]) -> Message:
    """The message with other reasoning, in its own field and in the content; without if empty."""
    content = message.get("content", "")
    if reasoning := message.get("reasoning_content"):
        message = {**message, "reasoning_content": change(reasoning)}
        if not message["reasoning_content"]:
            del message["reasoning_content"]
    new, at = "", 0
    for begin, end in _blocks(content, (0, len(content)), inside=False):
        new += content[at:begin]
        at = end + len(END_OF_THINKING)
        if changed := change(content[begin:end].removeprefix(THINK).strip()):
            new += f"{THINK}\n{changed}\n{END_OF_THINKING}"
        elif not new or new[-1].isspace():
            at = len(content) - len(content[at:].lstrip())
    return {**message, "content": new + content[at:]} if at else message


def answer_pieces(message: Message) -> list[str]:
    """Texts of the reasoning and of the answer around it, in order."""
    pieces = (p for p in TAG.split(message.get("content", "")) if not TAG.fullmatch(p))
    return [p.strip() for p in (message.get("reasoning_content", ""), *pieces) if p.strip()]


def learnt_parts(text: str, span: Span, masked: bool) -> list[Span]:
    """Parts of an answer in a rendered text: without its reasoning, or if that is not masked,
    without every </think> that ends some."""
    start, stop = span
    parts = []
    for begin, end in _blocks(text, span, inside=text[:start].rstrip().endswith(THINK)):
        parts.append((start, begin if masked else len(text[:end].rstrip())))
        start = end + len(END_OF_THINKING)
    return [*parts, (start, stop)]


def _blocks(text: str, span: Span, inside: bool) -> list[Span]:
    """From where to which </think> each block of reasoning reaches; ``inside``: the span begins
    in one."""
    start, stop = span
    end = text.find(END_OF_THINKING, start, stop) if inside else -1
    first = [(start, end)] if end >= 0 else []
    return first + [m.span() for m in _BLOCK.finditer(text, max(start, end), stop)]
