"""Whether a chat template writes all that a conversation consists of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nemo_hybrid.data.reasoning import (
    END_OF_THINKING,
    TAG,
    Message,
    answer_pieces,
    check_tags,
)
from nemo_hybrid.data.sources import BadRecord

REASONING, ANSWER = "the reasoning", "a part of the answer"
_SWITCHES = re.compile(r"/(no_?)?think\b")
"""Words of users that templates take out of what they show."""
_SHOWN = 200  # characters of a rendering, in a message


class Marks:
    """Marks in place of all texts and numbers of a conversation, none of which occurs twice."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[str, int | None]] = {}
        """What each stands for, and in which turn, counted from 0."""
        self.passing: set[str] = set()
        """Those of reasoning, and of what is before its end, which a history may leave out."""

    def message(self, message: Message, turn: int) -> Message:
        """The message with marks."""
        marked, role, content = dict(message), message["role"], message.get("content", "")
        if role != "assistant":
            marked["content"] = self._instead(content, f"what the {role} says", turn)
            return marked
        thought, end, said = content.rpartition(END_OF_THINKING)
        before = len(self.made)
        if "reasoning_content" in message:
            marked["reasoning_content"] = self._instead(
                message["reasoning_content"], REASONING, turn
            )
        pieces = [
            p if TAG.fullmatch(p) else self._instead(p, ANSWER, turn) for p in TAG.split(thought)
        ]
        self.passing |= {*list(self.made)[before:]}
        if content:
            marked["content"] = "".join(pieces) + end + self._instead(said, ANSWER, turn)

        def mark(call: dict[str, Any]) -> dict[str, Any]:
            name, arguments = call["name"], call.get("arguments", {})
            as_text = isinstance(arguments, str)
            call = {**call, "name": self._instead(name, f"the call of {name}", turn)}
            found = self._leaves(json.loads(arguments) if as_text else arguments, name, turn)
            if "arguments" in call:
                call["arguments"] = json.dumps(found) if as_text else found
            return call

        return _with_calls(marked, mark)

    def tools(self, tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Tools with marks for names."""

        def mark(tool: dict[str, Any]) -> dict[str, Any]:
            if "function" in tool:
                return {**tool, "function": mark(tool["function"])}
            return {**tool, "name": self._instead(tool["name"], f"the tool {tool['name']}", None)}

        return None if tools is None else [mark(tool) for tool in tools]

    def _instead(self, text: str, what: str, turn: int | None) -> str:
        if not text.strip():
            return text
        mark = f"zq{len(self.made):06}qz"
        self.made[mark] = what, turn
        return mark

    def _leaves(self, value: Any, name: str, turn: int) -> Any:
        if isinstance(value, dict):
            return {key: self._leaves(inner, name, turn) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._leaves(inner, name, turn) for inner in value]
        what = f"the argument {value!r:.{_SHOWN}} of {name}"
        if isinstance(value, str):
            return self._instead(value, what, turn)
        if isinstance(value, bool) or value is None:
            return value
        number = type(value)(7_000_000_000 + len(self.made))
        self.made[str(number)] = what, turn
        return number


def check_written(message: Message, turn: int, written: str, start: int) -> None:
    """Raise BadRecord if a template leaves a part of an answer out, which would then be learnt
    without it, or breaks its reasoning. The answer begins at ``start`` of what is written for it.
    """
    reasoning, at = message.get("reasoning_content", "").strip(), start
    for part in answer_pieces(message):
        at = written.find(part, at)
        if at < 0:
            raise left_out(REASONING if part == reasoning else ANSWER, written, turn)
        at += len(part)
    for call in _calls(message):
        if call["name"] not in written[start:]:
            raise left_out(f"the call of {call['name']}", written, turn)
    try:
        check_tags(written)
    except BadRecord as e:
        why = f"turn {turn + 1}: as the chat template writes it, {e}: {shorten(written)}"
        raise BadRecord(why, e.kind) from None


def check_context(messages: Sequence[Message], text: str) -> None:
    """Raise BadRecord if what an answer refers to does not stand in a text in its order."""
    shown, at = _squeezed(text), 0
    for turn, message in enumerate(messages):
        role, content = message["role"], message.get("content", "")
        if role == "assistant":  # whose reasoning may be left out
            content = content.rpartition(END_OF_THINKING)[2]
        # Some templates write what a system says behind other messages.
        ordered = role not in ("system", "developer")
        found = _find(shown, content, at if ordered else 0)
        if found < 0:
            raise left_out(f"what the {role} says", text, turn)
        for call in _calls(message):
            _check_arguments(call, turn, text, shown, at)
        at = found if ordered else at


def with_text_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON texts."""

    def change(call: dict[str, Any]) -> dict[str, Any]:
        return {**call, "arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}

    return _with_calls(message, change)


def left_out(what: str, text: str, turn: int | None) -> BadRecord:
    """``turn`` counts from 0; None: what is left out belongs to none."""
    where = "" if turn is None else f"turn {turn + 1}: "
    why = f"{where}the chat template leaves out {what}: it writes {shorten(text)}"
    return BadRecord(why, "left out")


def shorten(text: str) -> str:
    """A text, or its start and its end, in quotes and on one line."""
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
    return repr(text)


def _check_arguments(call: dict[str, Any], turn: int, text: str, shown: str, at: int) -> None:
    arguments = call.get("arguments") or {}
    if isinstance(arguments, dict):
        python = str(arguments)
        if python != json.dumps(arguments, ensure_ascii=False) and python in text:
            why = f"turn {turn + 1}: the chat template writes arguments as Python, not as JSON"
            raise BadRecord(f"{why}: {shorten(python)}", "chat template")
    else:
        arguments = json.loads(arguments)
    parts = {f"the argument {v!r:.{_SHOWN}} of {call['name']}": v for v in _leaves(arguments)}
    for what, part in {f"the call of {call['name']}": call["name"], **parts}.items():
        if _find(shown, part, at) < 0:
            raise left_out(what, text, turn)


def _calls(message: Message) -> list[dict[str, Any]]:
    return [call.get("function", call) for call in message.get("tool_calls", [])]


def _with_calls(message: Message, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Message:
    """The message with what is called changed."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": change(call["function"])} if "function" in call else change(call)
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _leaves(value: Any) -> Iterator[Any]:
    """Values in nested lists and objects."""
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _find(shown: str, value: Any, at: int) -> int:
    """Where a value ends in a squeezed text behind ``at``, however it is written there; or -1."""
    texts = [str(value), json.dumps(value, ensure_ascii=False), json.dumps(value)]
    if isinstance(value, str):
        texts = [value, *(text[1:-1] for text in texts[1:]), _SWITCHES.sub("", value)]
    for text in map(_squeezed, texts):
        found = shown.find(text, at)
        if found >= 0:
            return found + len(text)
    return -1


def _squeezed(text: str) -> str:
    """Without white space and backslashes, which templates and JSON change."""
    return re.sub(r"[\s\\]+", "", text)
