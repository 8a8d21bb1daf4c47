"""What a chat template writes, and which of it are answers.

A template is a program, and nothing says which of the text that it writes is the assistant's. So
for the assistant's turn i it renders three texts: H, the messages before it; G, the same with the
generation prompt, which is what a model is given when it has to answer; Q, the messages up to and
including it. The turn is learnt from where the prompt ends in Q to the end of Q. That is sound only
if G and Q continue H, which is checked for every turn.

Templates may leave the reasoning of earlier turns out of the history. Then the whole text does not
begin with Q, and the turn is learnt in a sample of its own, which ends with it: there it is
rendered as a model would have written it.

Templates come with downloads, so this module runs as a process (see `template.Renderer`): lines of
JSON in and out, and whoever takes too long is killed.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from nemo_hybrid.data.reasoning import (
    END_OF_THINKING,
    THINK,
    Message,
    Span,
    answer_pieces,
    check_tags,
)
from nemo_hybrid.data.sources import BadRecord
from nemo_hybrid.errors import UserError

Rendered = tuple[str, list[Span]]
"""A text and the characters of it that are learnt."""

_MARKED = re.compile(r"\{%[-+]?\s*generation\b")
_SWITCHES = re.compile(r"/(no_?)?think\b")
"""Words of users that templates take out of what they show."""
_SHOWN = 200  # characters of a rendering, in a message
_EXACT = 16  # messages before a turn, up to which all of them are rendered for it
_MEMORY = 4 << 30  # bytes that a template may use
_LEFT_OUT = "left out"


class Template:
    """A template, what it is given beside messages, and where it came from, for messages."""

    def __init__(self, source: str, origin: str, tools: Any, options: dict[str, Any]) -> None:
        self.source, self.origin, self.tools, self.options = source, origin, tools, options

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """Raises BadRecord with what the template complains of."""
        return str(self._run(messages, **options)[0][0])

    def split(self, messages: list[Message], turns: Sequence[int]) -> list[Rendered]:
        """Renderings in which each of the assistant's turns named is learnt once.

        Raises BadRecord where the template cannot be split, or leaves something out.
        """
        try:
            return self._split(messages, turns)
        except BadRecord:
            # Templates that want arguments as text fail on objects, or write them as Python does.
            texts = [_with_text_arguments(m) for m in messages]
            if texts == messages:
                raise
            try:
                return self._split(texts, turns)
            except BadRecord:
                pass
            raise

    def _split(self, messages: list[Message], turns: Sequence[int]) -> list[Rendered]:
        self._check_tools(messages)
        before = self.render(messages[: turns[0]])
        if self._prompt(before, messages[: turns[0]]) == "":
            rendered = [self._marked(messages, turns)]
            self._check_context(messages, rendered[0][0])
            return rendered
        renderings, answers = [], dict[int, tuple[str, int]]()
        while turns:
            text, start = self._answer(messages[: turns[-1]], messages[turns[-1]], turns[-1])
            self._check_context(messages[: turns[-1] + 1], text)
            spans, elsewhere, known = list[Span](), [], None
            for turn in turns[:-1]:
                span = known and self._follows(messages, text, known[0], known[1], turn)
                if not span:
                    if turn not in answers:
                        answers[turn] = self._answer(messages[:turn], messages[turn], turn)
                    theirs, begin = answers[turn]
                    span = (begin, len(theirs)) if text.startswith(theirs) else None
                if span:
                    spans.append(span)
                    known = turn, span[1]
                else:
                    elsewhere.append(turn)
            renderings.append((text, [*spans, (start, len(text))]))
            turns = elsewhere
        return renderings[::-1]

    def _answer(self, earlier: Sequence[Message], message: Message, turn: int) -> tuple[str, int]:
        """Text up to the end of an answer, and where in it the answer begins to be learnt."""
        before = self.render(earlier)
        prompt = self._prompt(before, earlier)
        text = self.render([*earlier, message])
        if prompt is None or not text.startswith(before):
            raise _unsplittable(turn, "it changes what it wrote before", text)
        prompts = [prompt]
        if THINK in prompt:  # and white space behind it, which answers may lack
            prompts.append(prompt.partition(THINK)[0] + THINK)
        if "enable_thinking" in self.source:
            # An answer without reasoning is what engines ask for by another prompt.
            prompts.append(self._prompt(before, earlier, enable_thinking=False) or prompt)
        fitting = [len(p) for p in prompts if text.startswith(before + p)]
        if not fitting:
            raise _unsplittable(turn, f"the answer does not follow the prompt {prompt!r}", text)
        start = len(before) + max(fitting)
        if start == len(text):
            raise _unsplittable(turn, "it writes nothing of the answer", text)
        _check_written(message, turn, text[len(before) :])
        return text, start

    def _follows(
        self, messages: Sequence[Message], text: str, known: int, end: int, turn: int
    ) -> Span | None:
        """Where a turn is learnt in a text in which an earlier, known one ends at ``end``.

        With all messages before it this would take a time that grows with their square. So they
        are left out but for those since the known one and the question before that, and what is
        rendered of them is compared with the text. None: it is not the same, or there are few.
        """
        if turn < _EXACT:
            return None
        lead = [m for m in messages[:1] if m["role"] in ("system", "developer")]
        asked = max(i for i in range(known) if messages[i]["role"] == "user")
        earlier = [*lead, messages[asked], *messages[known:turn]]
        try:
            before = self.render(earlier[: len(lead) + 2])
            found, start = self._answer(earlier, messages[turn], turn)
        except BadRecord:
            return None
        if not found.startswith(before) or not text.startswith(found[len(before) :], end):
            return None
        shift = end - len(before)
        return start + shift, len(found) + shift

    def _prompt(self, before: str, messages: Sequence[Message], **options: Any) -> str | None:
        """What asks for an answer; None if the template changes what it wrote before."""
        asked = self.render(messages, add_generation_prompt=True, **options)
        return asked[len(before) :] if asked.startswith(before) else None

    def _marked(self, messages: Sequence[Message], turns: Sequence[int]) -> Rendered:
        """The rendering of a template that has no generation prompt, but marks the answers."""
        if not _MARKED.search(self.source):
            raise _unsplittable(turns[0], "it has no generation prompt", self.render(messages))
        learnt, spans, known = list[Span](), list[Span](), ""
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                (text,), (marks,) = self._run(
                    messages[: turn + 1], return_assistant_tokens_mask=True
                )
                marks = [tuple(mark) for mark in marks]
                new = marks[len(spans) :]
                if not new or marks[: len(spans)] != spans or not text.startswith(known):
                    raise _unsplittable(turn, "it does not mark the answer", text)
                if turn in turns:
                    opened = THINK if text[: new[0][0]].rstrip().endswith(THINK) else ""
                    _check_written(message, turn, opened + text[new[0][0] : new[-1][1]])
                    learnt += new
                spans, known = marks, text[: marks[-1][1]]
        return self.render(messages), learnt

    def _check_tools(self, messages: Sequence[Message]) -> None:
        """Raise BadRecord if the template leaves out a tool. Calls name tools too, so that this
        looks at what stands before the first answer, with tools and without."""
        if not self.tools:
            return
        roles = [message["role"] for message in messages]
        earlier = messages[: roles.index("assistant")]
        text = self.render(earlier)
        shown, plain = _squeezed(text), _squeezed(self.render(earlier, tools=None))
        for tool in self.tools:
            name = tool.get("function", tool)["name"]
            if shown.count(_squeezed(name)) <= plain.count(_squeezed(name)):
                raise _left_out(f"the tool {name}", text)

    def _check_context(self, messages: Sequence[Message], text: str) -> None:
        """Raise BadRecord if the template leaves out what an answer refers to."""
        shown, at = _squeezed(text), 0
        for turn, message in enumerate(messages, 1):
            role, content = message["role"], message.get("content", "")
            if role == "assistant":  # whose reasoning may be
                content = content.rpartition(END_OF_THINKING)[2]
            # Some templates write what a system says behind other messages.
            ordered = role not in ("system", "developer")
            found = _find(shown, content, at if ordered else 0)
            if found < 0:
                raise _left_out(f"what the {role} says", text, turn)
            for call in _calls(message):
                _check_arguments(call, turn, text, shown, at)
            at = found if ordered else at

    def _run(self, messages: Sequence[Message], **options: Any) -> tuple[Any, Any]:
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # In Jinja's sandbox, and as serving engines do it.
            rendered: tuple[Any, Any] = render_jinja_template(
                [list(messages)],
                chat_template=self.source,
                **{"tools": self.tools, **self.options, **options},
            )
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


def _check_written(message: Message, turn: int, written: str) -> None:
    """Raise BadRecord if a template leaves a part of an answer out, which would then be learnt
    without it, or breaks its reasoning."""
    shown = _squeezed(written)
    reasoning = message.get("reasoning_content", "").strip()
    for part in answer_pieces(message):
        if _find(shown, part, 0) < 0:
            what = "the reasoning" if part == reasoning else "a part of the answer"
            raise _left_out(what, written, turn + 1)
    for call in _calls(message):
        if call["name"] not in written:
            raise _left_out(f"the call of {call['name']}", written, turn + 1)
    try:
        check_tags(written)
    except BadRecord as e:
        why = f"turn {turn + 1}: as the chat template writes it, {e}: {_shorten(written)}"
        raise BadRecord(why, e.kind) from None


def _check_arguments(call: dict[str, Any], turn: int, text: str, shown: str, at: int) -> None:
    arguments = call.get("arguments") or {}
    if isinstance(arguments, dict):
        python = str(arguments)
        if python != json.dumps(arguments, ensure_ascii=False) and python in text:
            why = f"turn {turn}: the chat template writes arguments as Python, not as JSON"
            raise BadRecord(f"{why}: {_shorten(python)}", "chat template")
    else:
        arguments = json.loads(arguments)
    parts = {f"the argument {v!r:.{_SHOWN}} of {call['name']}": v for v in _leaves(arguments)}
    for what, part in {f"the call of {call['name']}": call["name"], **parts}.items():
        if _find(shown, part, at) < 0:
            raise _left_out(what, text, turn)


def _calls(message: Message) -> list[dict[str, Any]]:
    return [call.get("function", call) for call in message.get("tool_calls", [])]


def _with_text_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON texts."""
    if "tool_calls" not in message:
        return message

    def change(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": change(call["function"])}
        return {**call, "arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}

    return {**message, "tool_calls": [change(call) for call in message["tool_calls"]]}


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


def _left_out(what: str, text: str, turn: int | None = None) -> BadRecord:
    where = "" if turn is None else f"turn {turn}: "
    why = f"{where}the chat template leaves out {what}: it writes {_shorten(text)}"
    return BadRecord(why, _LEFT_OUT)


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


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    """Renderings, or what is wrong with a record or with the template."""
    template = Template(**request["template"])
    try:
        if "turns" in request:
            return {"renderings": template.split(request["messages"], request["turns"])}
        return {"text": template.render(request["messages"], **request["options"])}
    except BadRecord as e:
        return {"bad": [str(e), e.kind]}
    except UserError as e:
        return {"error": str(e)}


def main() -> None:
    """Answer each line of the standard input by a line."""
    import transformers.utils.chat_template_utils  # noqa: F401  before there is a limit

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin:
        request = json.loads(line)
        # Seconds of the processor, after which the system ends this process.
        signal.setitimer(signal.ITIMER_PROF, request.pop("seconds"))
        answer = answer_request(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)
