"""Conversations: checking them, rendering them with a chat template, finding what is learnt.

A template is a program, and nothing says which of the text that it writes is the assistant's. So
for the assistant's turn i it renders three texts: H, the messages before it; G, the same with the
generation prompt, which is what a model is given when it has to answer; Q, the messages up to and
including it. The turn is learnt from where the prompt ends in Q to the end of Q. That is sound only
if G and Q continue H, which is checked for every turn.

Templates may leave the reasoning of earlier turns out of the history. Then the whole text does not
begin with Q, and the turn is learnt in a sample of its own, which ends with it: there it is
rendered as a model would have written it.

Reasoning is the field reasoning_content, and in text every block from <think> to the next </think>.
Where prompts open the thinking, answers begin inside of it; data made with them has a </think> that
nothing opens. It ends reasoning where it begins a line; elsewhere somebody mentions it.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_hybrid.data.sources import BadRecord
from nemo_hybrid.data.tokenizer import CHAT_TEMPLATE, CONFIG, TextTokenizer
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming

Message = dict[str, Any]
Span = tuple[int, int]
"""From and to which character."""

THINK, END_OF_THINKING = "<think>", "</think>"
_BLOCK = re.compile(f"{THINK}.*?(?={END_OF_THINKING})", re.DOTALL)
_FOLLOWS = {
    "": {"system", "developer", "user"},
    "system": {"user"},
    "developer": {"user"},
    "user": {"assistant"},
    "assistant": {"user"},
    "tool": {"tool", "assistant"},
}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MARKED = re.compile(r"\{%[-+]?\s*generation\b")
_CONTROL = re.compile(r"<[|\uff5c][^\s<>|\uff5c]+[|\uff5c]>")
_PLAIN_TAG = re.compile(r"think|tool", re.IGNORECASE)
_SHOWN = 200  # characters of a rendering, in a message
_LONGEST_S = 10.0  # that a rendering may take


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation and the characters of it that are learnt."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, the tokenizer whose tokens it writes, and where it came from."""

    source: str
    tokenizer: TextTokenizer
    origin: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(self, messages: Sequence[Message], tools: Any = None, **options: Any) -> str:
        """Text of the messages. Raises BadRecord with what the template complains of, or for a
        special token that the tokenizer has not."""
        text = str(self._run(messages, tools, **options)[0][0])
        for token in _CONTROL.findall(text):
            if token not in self.tokenizer.added_tokens:
                raise BadRecord(
                    f"unknown special token {token}: the tokenizer has none", "special tokens"
                )
        return text

    def split(
        self, messages: Sequence[Message], tools: Any = None, first: int = 0
    ) -> list[Rendering]:
        """Renderings in which every turn of the assistant, from message ``first`` on, is learnt
        once. Raises BadRecord where the template cannot be split."""
        turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        if not turns:
            raise BadRecord("there is no message of the assistant to learn from", "empty answers")
        before = self.render(messages[: turns[0]], tools)
        if self._prompt(before, messages[: turns[0]], tools) == "":
            return [self._marked(messages, tools, turns)]
        found = {i: self._turn(messages, tools, i) for i in turns}
        renderings = []
        while turns:
            text, _ = found[turns[-1]]
            here = [i for i in turns if text.startswith(found[i][0])]
            renderings.append(Rendering(text, [(found[i][1], len(found[i][0])) for i in here]))
            turns = [i for i in turns if i not in here]
        return renderings[::-1]

    def check(self, content: object) -> None:
        """Raise BadRecord if a string in it would be encoded as one of the tokens that control a
        conversation, or is no text. Tags of thinking and tool use may be written out."""
        for text in _strings(content):
            for token in self._control:
                if token in text:
                    raise BadRecord(
                        f"the text holds {token}, which would become a control token",
                        "special tokens",
                    )
            try:
                text.encode()
            except UnicodeEncodeError:
                raise BadRecord("the text holds half a surrogate pair") from None

    @cached_property
    def _control(self) -> list[str]:
        named = set(self.tokenizer.named_tokens.values())
        return [
            token
            for token, special in self.tokenizer.added_tokens.items()
            if token in named
            or _CONTROL.fullmatch(token)
            or (special and token in self.source and not _PLAIN_TAG.search(token))
        ]

    def _turn(self, messages: Sequence[Message], tools: Any, turn: int) -> tuple[str, int]:
        """Text up to the end of a turn of the assistant, and where it begins to be learnt."""
        earlier = messages[:turn]
        before = self.render(earlier, tools)
        prompt = self._prompt(before, earlier, tools)
        text = self.render(messages[: turn + 1], tools)
        if prompt is None or not text.startswith(before):
            raise _unsplittable(turn, "it changes what it wrote before", text)
        head, think, _ = prompt.partition(THINK)
        if not text.startswith(before + head):
            raise _unsplittable(turn, f"the answer does not follow the prompt {head!r}", text)
        # An answer without reasoning is what engines ask for by another prompt.
        silent = self._prompt(before, earlier, tools, enable_thinking=False) or ""
        prompts = (before + p for p in (head, head + think, prompt, silent))
        start = max(len(p) for p in prompts if text.startswith(p))
        if start == len(text):
            raise _unsplittable(turn, "it writes nothing of the answer", text)
        _check_written(messages[turn], turn, text[len(before) :])
        return text, start

    def _prompt(
        self, before: str, messages: Sequence[Message], tools: Any, **options: Any
    ) -> str | None:
        """What asks for an answer; None if the template changes what it wrote before."""
        asked = self.render(messages, tools, add_generation_prompt=True, **options)
        return asked[len(before) :] if asked.startswith(before) else None

    def _marked(self, messages: Sequence[Message], tools: Any, turns: Sequence[int]) -> Rendering:
        """The rendering of a template that has no generation prompt, but marks the answers."""
        if not _MARKED.search(self.source):
            text = self.render(messages, tools)
            raise _unsplittable(turns[0], "it has no generation prompt", text)
        context, spans, known = 0, list[Span](), ""
        for turn, message in enumerate(messages):
            if turn == turns[0]:
                context = len(spans)
            if message["role"] == "assistant":
                (text,), (marks,) = self._run(
                    messages[: turn + 1], tools, return_assistant_tokens_mask=True
                )
                grown = len(marks) > len(spans) and marks[: len(spans)] == spans
                if not grown or not text.startswith(known):
                    raise _unsplittable(turn, "it does not mark the answer", text)
                spans, known = marks, text[: marks[-1][1]]
        return Rendering(self.render(messages, tools), spans[context:])

    def _run(self, messages: Sequence[Message], tools: Any, **options: Any) -> tuple[Any, Any]:
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {**self.tokenizer.named_tokens, **options}
        try:
            # In Jinja's sandbox, and as serving engines do it.
            with _time_limit(_LONGEST_S):
                rendered: tuple[Any, Any] = render_jinja_template(
                    [list(messages)], tools=tools, chat_template=self.source, **options
                )
        except TimeoutError as e:
            why = f"the chat template {self.origin} takes longer than {_LONGEST_S:g} s"
            raise UserError(f"{why} for a conversation of {len(messages)} messages") from e
        except TemplateSyntaxError as e:
            where = f"{self.origin} line {e.lineno}"
            raise UserError(f"the chat template is no valid Jinja: {where}: {e.message}") from e
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as e:
            frames = traceback.extract_tb(e.__traceback__)
            lines = [f.lineno for f in frames if f.filename == "<template>"]
            line = f" line {lines[-1]}" if lines else ""
            why = f"the chat template fails: {self.origin}{line}: {str(e) or type(e).__name__}"
            raise BadRecord(why, "chat template") from e
        return rendered


def load_template(
    tokenizer: TextTokenizer, directory: str | Path, file: str | None = None
) -> ChatTemplate | None:
    """The template of a file, else of the tokenizer's directory; None without any.

    Raises UserError for files that hold none.
    """
    if file is not None:
        with naming("read", Path(file)):
            return ChatTemplate(_decode(Path(file).read_bytes(), file), tokenizer, file)
    if CHAT_TEMPLATE in tokenizer.files:
        name = str(Path(directory) / CHAT_TEMPLATE)
        return ChatTemplate(_decode(tokenizer.files[CHAT_TEMPLATE], name), tokenizer, name)
    found = json.loads(tokenizer.files.get(CONFIG, b"{}")).get("chat_template")
    if isinstance(found, list):
        named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
        found = named[0].get("template") if named else None
    if isinstance(found, str):
        return ChatTemplate(found, tokenizer, str(Path(directory) / CONFIG))
    return None


def need_template(template: ChatTemplate | None, directory: str | Path) -> ChatTemplate:
    """Raise UserError if there is none."""
    if template is None:
        raise UserError(
            f"{directory} has no chat template, which conversations need: put one beside the "
            f"tokenizer as {CHAT_TEMPLATE}, or name one (chat_template) where samples are made"
        )
    return template


def files_with(template: ChatTemplate, tokenizer: TextTokenizer) -> dict[str, bytes]:
    """The tokenizer's files with this template as the only one."""
    settings = json.loads(tokenizer.files.get(CONFIG, b"{}"))
    settings.pop("chat_template", None)
    return {
        **tokenizer.files,
        CONFIG: json.dumps(settings, indent=2, ensure_ascii=False).encode(),
        CHAT_TEMPLATE: template.source.encode(),
    }


def read_messages(value: object) -> list[Message]:
    """Messages of a conversation, checked, with contents and reasoning as plain text.

    Raises BadRecord naming the turn, counted from 1.
    """
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
    if previous != "assistant":
        raise BadRecord(f"the last turn is the {previous}'s and not the assistant's", "wrong roles")
    return messages


def read_tools(value: object) -> list[dict[str, Any]] | None:
    """Tools of a conversation: a list of objects, or its JSON text. Raises BadRecord."""
    tools = _parsed(value, "tools") if isinstance(value, str) else value
    if tools is not None and not _are_objects(tools):
        raise BadRecord("tools is no list of JSON objects")
    return tools or None  # type: ignore[return-value]


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


def _check_written(message: Message, turn: int, written: str) -> None:
    """Raise BadRecord if a template leaves a part of an answer out, which would then be learnt
    without it."""
    calls = [call.get("function", call)["name"] for call in message.get("tool_calls", [])]
    parts = {f"the call of {name}": name for name in calls}
    parts["the reasoning"] = message.get("reasoning_content", "").strip()
    for what, part in parts.items():
        if part not in written:
            why = f"turn {turn + 1}: the chat template leaves out {what}"
            raise BadRecord(f"{why}: it writes {_shorten(written)}", "chat template")


def _read_message(item: object, turn: int) -> Message:
    if not isinstance(item, dict):
        raise BadRecord(f"turn {turn} is no JSON object")
    # Like transformers: tables have a value, which may be null, for every field of any message.
    message = {k: v for k, v in item.items() if v is not None and v != []}
    role = message.get("role")
    if not isinstance(role, str) or role not in _FOLLOWS or not role:
        known = ", ".join(role for role in _FOLLOWS if role)
        why = f"turn {turn} has the unknown role {_shorten(str(role))}; known: {known}"
        raise BadRecord(why, "wrong roles")
    content = item.get("content")
    if isinstance(content, list) and _are_objects(content):
        texts = [p.get("text") for p in content if p.get("type") == "text"]
        parts = [t for t in texts if isinstance(t, str)]
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
            message["reasoning_content"] = thoughts[0]
        if "tool_calls" in message:
            message["tool_calls"] = _read_calls(message["tool_calls"], turn)
    return message


def _read_calls(calls: object, turn: int) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which is what templates expect."""
    if not isinstance(calls, list) or not _are_objects(calls):
        raise BadRecord(f"turn {turn}: tool_calls is no list of JSON objects")
    read = []
    for call in calls:
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRecord(f"turn {turn}: a tool call names no function")
        if isinstance(inner.get("arguments"), str):
            what = f"turn {turn}: the arguments of {inner['name']}"
            inner = {**inner, "arguments": _parsed(inner["arguments"], what)}
        if not isinstance(inner.get("arguments", {}), dict):
            raise BadRecord(f"turn {turn}: the arguments of {inner['name']} are no JSON object")
        read.append({**call, "function": inner} if "function" in call else inner)
    return read


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRecord(f"{what} cannot be read as JSON") from None


def _are_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, dict) for v in value)


def _strings(content: object) -> Iterator[str]:
    """All strings in nested lists and objects."""
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer. Signals limit the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    handler, started = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if left:
            rest = max(1e-3, left - (time.monotonic() - started))
            signal.setitimer(signal.ITIMER_REAL, rest, interval)


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"the chat template {name} is not UTF-8") from e


def _unsplittable(turn: int, why: str, text: str) -> BadRecord:
    return BadRecord(
        f"the chat template cannot be split at turn {turn + 1}: {why}; it writes {_shorten(text)}",
        "chat template",
    )


def _shorten(text: str) -> str:
    """A text, or its start and its end, in quotes and on one line."""
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
    return repr(text)
