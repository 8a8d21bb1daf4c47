"""Conversations: checking them, and finding what of them is learnt, shown, or not understood."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_hybrid.data.reasoning import Message, check_reasoning, settle_reasoning
from nemo_hybrid.data.sources import BadRecord

_FOLLOWS = {
    "": {"system", "developer", "user"},
    "system": {"user"},
    "developer": {"user"},
    "user": {"assistant"},
    "assistant": {"user"},
    "tool": {"tool", "assistant"},
}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_LEARNT = ("weight", "train", "trainable", "training", "loss")
"""Fields that say whether a turn is learnt."""
_OF_CALLS = {"id", "type", "index"}
_OF_PARTS = "content."
"""Before the names of fields of a content's parts."""
_MEDIA = re.compile("image|audio|video|media|file")
_TEXT_ALONE = "only text can be learnt"
_REFUSED = {
    "functions": "give tools instead",
    "function_call": "give tool_calls instead",
    "thoughts": "give reasoning_content instead",
    **dict.fromkeys(("images", "audio", "video", "image", "audios", "videos"), _TEXT_ALONE),
}
"""Fields that would have to be shown, and what to do instead."""
_OF_TURNS = {**_REFUSED, "tools": "give them as a field of the record"}
OF_CONVERSATIONS = ("tools", "system", "chat_template_kwargs")
"""Fields of a record that conversations alone have."""


@dataclass(frozen=True)
class Conversation:
    """Checked messages, with contents and reasoning as plain text, and what goes with them."""

    messages: list[Message]
    learnt: list[int] = field(default_factory=list)
    """Numbers of the messages that are learnt."""
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template."""
    unread: frozenset[str] = frozenset()
    """Fields of messages that have no part in samples unless a template asks for them."""

    def changed(self, change: Callable[[int, Message], Message]) -> Conversation:
        """With other messages of the assistant; ``change`` takes their numbers too."""
        numbered = enumerate(self.messages)
        changed = [change(i, m) if m["role"] == "assistant" else m for i, m in numbered]
        return replace(self, messages=changed)


def read_conversation(content: Mapping[str, Any], value: object, first: int = 0) -> Conversation:
    """The conversation of a record, of which the assistant's turns from message ``first`` on are
    learnt unless they say otherwise. ``content``: fields that go with the messages.

    Raises BadRecord naming the turn, counted from 1.
    """
    messages, unread, learnt = read_messages(value), set[str](), list[int]()
    for turn, message in enumerate(messages):
        marks = {name: message.pop(name) for name in _LEARNT if name in message}
        if _is_learnt(marks, turn):
            if message["role"] != "assistant":
                unread |= marks.keys()
            elif turn >= first:
                learnt.append(turn)
        unread |= {n for n, v in message.items() if says_something(v) and not is_known(message, n)}
        for name in [name for name in message if name.startswith(_OF_PARTS)]:
            del message[name]  # which no template can ask for
    if not any(m["role"] == "assistant" for m in messages[first:]):
        raise BadRecord("there is no message of the assistant to learn from", "empty answers")
    if not learnt:
        raise BadRecord("every turn says that it is not learnt", "all-masked")
    messages = [settle_reasoning(m) if m["role"] == "assistant" else m for m in messages]
    for turn in learnt:
        try:
            check_reasoning(messages[turn])
        except BadRecord as e:
            raise BadRecord(f"turn {turn + 1}: {e}", e.kind) from None
    return _with_fields(messages, learnt, unread, content)


def read_question(content: Mapping[str, Any], value: object) -> Conversation:
    """The conversation of a record whose next turn the assistant is to say. ``content``: fields
    that go with the messages. Raises BadRecord naming the turn, counted from 1."""
    messages = _read_turns(value)
    if (last := messages[-1]["role"]) not in ("user", "tool"):
        raise BadRecord(f"the last turn is the {last}'s: nothing is to be answered", "wrong roles")
    messages = [{k: v for k, v in m.items() if k not in _LEARNT} for m in messages]
    messages = [settle_reasoning(m) if m["role"] == "assistant" else m for m in messages]
    return _with_fields(messages, [], set(), content)


def _with_fields(
    messages: list[Message], learnt: list[int], unread: Set[str], content: Mapping[str, Any]
) -> Conversation:
    system = content.get("system")
    if says_something(system):
        messages, shift = _with_system(messages, system)
        learnt = [turn + shift for turn in learnt]
    options = _parsed_if_text(content.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    if not isinstance(options, dict):
        raise BadRecord("chat_template_kwargs is no JSON object")
    return Conversation(
        messages, learnt, read_tools(content.get("tools")), options, frozenset(unread)
    )


def read_messages(value: object) -> list[Message]:
    """Messages of a whole conversation, checked. Raises BadRecord naming the turn, counted from
    1."""
    messages = _read_turns(value)
    if (last := messages[-1]["role"]) != "assistant":
        raise BadRecord(f"the last turn is the {last}'s and not the assistant's", "wrong roles")
    return messages


def _read_turns(value: object) -> list[Message]:
    """Messages in an order that a conversation may have, at least one."""
    if not isinstance(value, list) or not value:
        raise BadRecord("the messages are no list, or an empty one")
    messages: list[Message] = []
    previous, tools_called = "", False
    for turn, item in enumerate(value, 1):
        message = _read_message(item, turn)
        role = message["role"]
        if role not in _FOLLOWS[previous] and not (role == "tool" and tools_called):
            place = f"follow the {previous}'s" if previous else "be the first"
            raise BadRecord(f"turn {turn}: a message of the {role} must not {place}", "wrong roles")
        messages.append(message)
        previous, tools_called = role, bool(message.get("tool_calls"))
    return messages


def read_tools(value: object) -> list[dict[str, Any]] | None:
    """Tools of a conversation: a list of objects, or its JSON text. Raises BadRecord."""
    tools = _parsed_if_text(value, "tools")
    if tools is not None and not _are_objects(tools):
        raise BadRecord("tools is no list of JSON objects")
    for number, tool in enumerate(tools or (), 1):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord(f"tools: entry {number} has no name")
    return tools


def refuse_fields(content: Mapping[str, Any], conversation: bool) -> None:
    """Raise BadRecord for fields of a record that would have to be shown or learnt, and cannot."""
    others = {} if conversation else dict.fromkeys(OF_CONVERSATIONS, "conversations alone have it")
    _refuse(content, {**_REFUSED, **others}, "")
    for name in _LEARNT:
        if name in content and content[name] not in (1, None):  # as is true
            raise BadRecord(f"the field {name}: it belongs to a turn", "refused fields")


def says_something(value: object) -> bool:
    """Whether a field holds anything: tables have all fields in every row."""
    return value is not None and value not in ("", [], {})


def is_known(message: Message, field: str) -> bool:
    """Whether a field of a message has a meaning without a template that asks for it."""
    role = message["role"]
    own = {"assistant": ("reasoning_content", "tool_calls"), "tool": ("tool_call_id",)}
    return field in ("role", "content", *own.get(role, ()))


def is_empty(message: Message) -> bool:
    """Whether nothing is said, thought or called."""
    said = message.get("content", "") + message.get("reasoning_content", "")
    return not said.strip() and not message.get("tool_calls")


def check_answers(messages: Sequence[Message], when: str = "") -> None:
    """Raise BadRecord for a turn of the assistant that says nothing."""
    for turn, message in enumerate(messages, 1):
        if message["role"] == "assistant" and is_empty(message):
            why = f"turn {turn}: the assistant's message is empty{when}"
            raise BadRecord(why, "empty answers")


def _is_learnt(marks: Mapping[str, Any], turn: int) -> bool:
    """What a turn says of itself, which is learnt by default."""
    says = {}
    for name, value in marks.items():
        if value not in (0, 1):  # as are true and false
            why = f"turn {turn + 1}: {name} {value!r} is neither 0 nor 1, true nor false"
            raise BadRecord(why, "refused fields")
        says[bool(value)] = name
    if len(says) == 2:
        why = f"turn {turn + 1}: {says[True]} contradicts {says[False]}"
        raise BadRecord(why, "refused fields")
    return False not in says


def _with_system(messages: list[Message], system: object) -> tuple[list[Message], int]:
    """The messages after one of the system, and by how much that moves them."""
    if not isinstance(system, str):
        raise BadRecord("system is not text")
    if messages[0]["role"] == "user":
        return [{"role": "system", "content": system}, *messages], 1
    if messages[0]["content"] != system:
        raise BadRecord("system is another text than the first message's", "refused fields")
    return messages, 0


def _refuse(fields: Mapping[str, Any], refused: Mapping[str, str], where: str) -> None:
    for name in sorted(fields.keys() & refused.keys()):
        if fields[name]:
            raise BadRecord(f"{where}the field {name}: {refused[name]}", "refused fields")


def _read_message(item: object, turn: int) -> Message:
    if not isinstance(item, dict):
        raise BadRecord(f"turn {turn} is no JSON object")
    # Like transformers: tables have a value, which may be null, for every field of any message.
    message = {k: v for k, v in item.items() if v is not None and v != []}
    role = message.get("role")
    if not isinstance(role, str) or role not in _FOLLOWS or not role:
        known = ", ".join(role for role in _FOLLOWS if role)
        why = f"turn {turn} has the unknown role {str(role)[:50]!r}; known: {known}"
        raise BadRecord(why, "wrong roles")
    _refuse(message, _OF_TURNS, f"turn {turn}: ")
    content = item.get("content")
    if isinstance(content, list) and _are_objects(content):
        kinds = [part.get("type") for part in content]
        others = [kind for kind in kinds if isinstance(kind, str) and kind != "text"]
        keys = {key for p in content for key, v in p.items() if says_something(v)}
        if others := others + sorted(filter(_MEDIA.search, keys)):
            why = f"turn {turn}: the content is not text, but holds {others[0]}: {_TEXT_ALONE}"
            raise BadRecord(why, "refused fields")
        message |= {f"{_OF_PARTS}{key}": True for key in keys - {"type", "text"}}
        parts = [p["text"] for p in content if isinstance(p.get("text"), str)]
        content = "".join(parts) if len(parts) == len(content) else content
    if isinstance(content, str):
        message["content"] = content
    elif role != "assistant" or content is not None:
        lacks = "there is no content" if "content" not in item else "the content is not text"
        raise BadRecord(f"turn {turn}: {lacks}")
    if role == "assistant":
        thoughts = [message.pop(k) for k in _REASONING if k in message]
        if thoughts:
            if not isinstance(thoughts[0], str):
                raise BadRecord(f"turn {turn}: the reasoning is not text")
            if any(thought != thoughts[0] for thought in thoughts):
                raise BadRecord(f"turn {turn}: two fields of reasoning differ")
            message["reasoning_content"] = thoughts[0]
        if "tool_calls" in message:
            message["tool_calls"] = _read_calls(message["tool_calls"], turn)
    return message


def _read_calls(calls: object, turn: int) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which is what most templates expect."""
    if not isinstance(calls, list) or not _are_objects(calls):
        raise BadRecord(f"turn {turn}: tool_calls is no list of JSON objects")
    read = []
    for call in calls:
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRecord(f"turn {turn}: a tool call names no function")
        _refuse_others(inner, {"name", "arguments", *_OF_CALLS}, turn)
        if inner is not call:
            _refuse_others(call, {"function", *_OF_CALLS}, turn)
        if "arguments" in inner:
            what = f"turn {turn}: the arguments of {inner['name']}"
            arguments = _parsed_if_text(inner["arguments"] or {}, what)
            inner = {**inner, "arguments": arguments}
            if not isinstance(inner["arguments"], dict):
                raise BadRecord(f"{what} are no JSON object")
        read.append({**call, "function": inner} if "function" in call else inner)
    return read


def _refuse_others(call: Mapping[str, Any], known: Set[str], turn: int) -> None:
    others = sorted(name for name in call.keys() - known if says_something(call[name]))
    if others:
        why = f"turn {turn}: the field {others[0]} of a tool call: give name and arguments"
        raise BadRecord(why, "refused fields")


def _parsed_if_text(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_object, parse_float=_float)
    except (ValueError, RecursionError):
        raise BadRecord(f"{what} cannot be read as JSON") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("beyond all numbers")
    return value


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, dict) for v in value)
