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
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any

from nemo_hybrid.data.chat import is_known
from nemo_hybrid.data.completeness import (
    Marks,
    check_context,
    check_written,
    left_out,
    shorten,
    with_text_arguments,
)
from nemo_hybrid.data.reasoning import THINK, THINKING_SWITCHES, Message, Span
from nemo_hybrid.data.sources import BadRecord
from nemo_hybrid.errors import UserError

Rendered = tuple[str, list[Span]]
"""A text and the characters of it that are learnt."""

_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
"""Marks around answers, by an extension of transformers."""
_SWITCH = THINKING_SWITCHES[0]
_EXACT = 16  # messages before a turn, up to which all of them are rendered for it
_MEMORY = 4 << 30  # bytes that a template may use


class Template:
    """A template, what it is given beside messages, and where it came from, for messages."""

    def __init__(self, source: str, origin: str, tools: Any, options: dict[str, Any]) -> None:
        self.source, self.origin, self.tools, self.options = source, origin, tools, options

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """Raises BadRecord with what the template complains of."""
        return str(self._run(messages, **options)[0][0])

    def split(self, messages: list[Message], turns: Sequence[int]) -> list[Rendered]:
        """Renderings in which each of the assistant's turns named is learnt once, in that of the
        nearest turn from it on whose text shows it as it was written.

        Raises BadRecord where the template cannot be split, or leaves something out.
        """
        try:
            return self._split(messages, turns)
        except BadRecord:
            # Templates that want arguments as text fail on objects, or write them as Python does.
            texts = [with_text_arguments(m) for m in messages]
            if texts == messages:
                raise
            try:
                return self._split(texts, turns)
            except BadRecord:
                pass
            raise

    def reads_variable(self, name: str) -> bool:
        """Whether the template takes a variable from its caller."""
        from jinja2 import Environment
        from jinja2.meta import find_undeclared_variables

        source = _GENERATION.sub("", self.source)  # an extension's, which changes no variable
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        asked = rf"(?<![.\w]){re.escape(name)}\s*(is\s+(not\s+)?(defined|none)|\|\s*default)"
        own = re.search(rf"\bset\s+{re.escape(name)}\b", source)
        taken = name in find_undeclared_variables(parsed)
        return taken and (not own or re.search(asked, source) is not None)

    def unread(self, messages: list[Message], fields: Sequence[str]) -> list[str]:
        """Those of the fields of messages without which nothing else is written."""

        def without(names: Sequence[str]) -> list[Message]:
            return [
                {k: v for k, v in m.items() if k not in names or is_known(m, k)} for m in messages
            ]

        text = self.render(messages)
        if text == self.render(without(fields)):
            return list(fields)
        return [name for name in fields if text == self.render(without([name]))]

    def _split(self, messages: list[Message], turns: Sequence[int]) -> list[Rendered]:
        last = messages[: turns[-1] + 1]
        check_context(last, self.render(last))
        self._check_all_is_kept(last)
        before = messages[: turns[0]]
        if self._prompt(self.render(before), before) == "":
            return [self._marked(messages, turns)]
        renderings, later = list[Rendered](), (0, 0)  # a turn and where it ends
        for turn in reversed(turns):
            span = None
            if renderings and turn >= _EXACT:
                span = self._place(messages, renderings[0][0], *later, turn)
            if span is None:
                text, start = self._whole(messages, turn)
                span = start, len(text)
                if not renderings or not renderings[0][0].startswith(text):
                    renderings.insert(0, (text, []))
            renderings[0][1].insert(0, span)
            later = turn, span[1]
        return renderings

    def _whole(self, messages: Sequence[Message], turn: int) -> tuple[str, int]:
        """Text up to the end of a turn, and where the turn begins to be learnt."""
        if turn >= _EXACT:
            text, written = self.render(messages[: turn + 1]), self._alone(messages, turn)
            if written and text.endswith(written[0]):
                return text, len(text) - len(written[0]) + written[1]
        return self._answer(messages[:turn], messages[turn], turn)[:2]

    def _place(
        self, messages: Sequence[Message], text: str, later: int, end: int, turn: int
    ) -> Span | None:
        """Where a turn behind many messages is learnt in a text in which a later one, the next that
        is learnt, ends at ``end``; None: not there.

        Its prompt and its end are looked for with the messages that lie between the two turns
        alone: with all before it, a conversation would take a time that grows with the square of
        its length.
        """
        lead, asked = _opening(messages, turn)
        known = [*lead, messages[asked], messages[turn]]
        try:
            before = self.render(known)
            found = self.render([*known, *messages[turn + 1 : later + 1]])
        except BadRecord:
            return None
        between, written = found[len(before) :], self._alone(messages, turn)
        stop = end - len(between)
        if written is None or not found.startswith(before):
            return None
        shown = text[:end].endswith(between) and text[:stop].endswith(written[0])
        return (stop - len(written[0]) + written[1], stop) if shown else None

    def _alone(self, messages: Sequence[Message], turn: int) -> tuple[str, int] | None:
        """What is written for a turn alone, and where in it it begins to be learnt, behind few
        messages: the question and what came since the answer before. None: not to be had."""
        lead, asked = _opening(messages, turn)
        since = [i for i in range(asked + 1, turn) if messages[i]["role"] == "assistant"]
        recent = messages[since[-1] if since else asked + 1 : turn]
        try:
            text, start, before = self._answer(
                [*lead, messages[asked], *recent], messages[turn], turn
            )
        except BadRecord:
            return None
        return text[before:], start - before

    def _answer(
        self, earlier: Sequence[Message], message: Message, turn: int
    ) -> tuple[str, int, int]:
        """Text up to the end of an answer, where in it that begins to be learnt, and where what is
        before it ends."""
        before = self.render(earlier)
        prompt = self._prompt(before, earlier)
        text = self.render([*earlier, message])
        if prompt is None or not text.startswith(before):
            raise _unsplittable(turn, "it changes what it wrote before", text)
        prompts, written = [prompt], text[len(before) :]
        if THINK in written and _SWITCH in self.source and _SWITCH not in self.options:
            # What engines ask by for an answer without reasoning, or with it.
            others = (self._prompt(before, earlier, **{_SWITCH: on}) for on in (False, True))
            prompts += filter(None, others)
        # An answer may lack the white space that a prompt has behind the tag.
        prompts += [p.rstrip() for p in prompts if p.rstrip().endswith(THINK)]
        fitting = [len(p) for p in prompts if written.startswith(p)]
        if not fitting:
            raise _unsplittable(turn, f"the answer does not follow the prompt {prompt!r}", text)
        start = len(before) + max(fitting)
        if start == len(text):
            raise _unsplittable(turn, "it writes nothing of the answer", text)
        check_written(message, turn, written, start - len(before))
        return text, start, len(before)

    def _prompt(self, before: str, messages: Sequence[Message], **options: Any) -> str | None:
        """What asks for an answer; None if the template changes what it wrote before."""
        asked = self.render(messages, add_generation_prompt=True, **options)
        return asked[len(before) :] if asked.startswith(before) else None

    def _marked(self, messages: Sequence[Message], turns: Sequence[int]) -> Rendered:
        """The rendering of a template that has no generation prompt, but marks the answers."""
        if not _GENERATION.search(self.source):
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
                    written = opened + text[new[0][0] : new[-1][1]]
                    check_written(message, turn, written, len(opened))
                    learnt += new
                spans, known = marks, text[: marks[-1][1]]
        return self.render(messages), learnt

    def _check_all_is_kept(self, messages: Sequence[Message]) -> None:
        """Raise BadRecord if the template leaves something out, wherever else its text may stand:
        with marks in place of all texts, it has to write every mark."""
        marks = Marks()
        marked = [marks.message(m, turn) for turn, m in enumerate(messages)]
        try:
            text = self.render(marked, tools=marks.tools(self.tools))
        except BadRecord:
            return  # it asks for more than texts; then what it does with these counts
        for mark, (what, turn) in marks.made.items():
            if mark not in text and (mark not in marks.passing or turn == len(messages) - 1):
                shown = self.render(messages)
                raise left_out(what, shown, turn)

    def _run(self, messages: Sequence[Message], **options: Any) -> tuple[Any, Any]:
        from jinja2 import TemplateSyntaxError
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
        except Exception as e:  # a template is a program, and fails as it likes
            frames = traceback.extract_tb(e.__traceback__)
            lines = [f.lineno for f in frames if f.filename == "<template>"]
            line = f" line {lines[-1]}" if lines else ""
            why = f"the chat template fails: {self.origin}{line}: {str(e) or type(e).__name__}"
            raise BadRecord(why, "chat template") from e
        return rendered


def _opening(messages: Sequence[Message], turn: int) -> tuple[list[Message], int]:
    """What the system says, and the number of the question that a turn answers."""
    lead = [m for m in messages[:1] if m["role"] in ("system", "developer")]
    return lead, max(i for i in range(turn) if messages[i]["role"] == "user")


def _unsplittable(turn: int, why: str, text: str) -> BadRecord:
    return BadRecord(
        f"the chat template cannot be split at turn {turn + 1}: {why}; it writes {shorten(text)}",
        "chat template",
    )


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    """Renderings, or what is wrong with a record or with the template."""
    template = Template(**request["template"])
    try:
        if "messages" not in request:
            return {"taken": list(filter(template.reads_variable, request["variables"]))}
        messages = request["messages"]
        for name in request.get("variables", ()):
            if not template.reads_variable(name):
                why = f"chat_template_kwargs: the chat template takes no {name}"
                raise BadRecord(why, "refused fields")
        if "turns" in request:
            renderings = template.split(messages, request["turns"])
            fields = request["fields"]
            unread = template.unread(messages, fields) if fields else []
            return {"renderings": renderings, "unread": unread}
        return {"text": template.render(messages, **request["options"])}
    except BadRecord as e:
        return {"bad": [str(e), e.kind]}
    except UserError as e:
        return {"error": str(e)}


def main(answers: int) -> None:
    """Answer each line of the standard input by a line in the open file of this number; what a
    library prints goes elsewhere."""
    import transformers.utils.chat_template_utils  # noqa: F401  before there is a limit

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with os.fdopen(answers, "w") as out, suppress(BrokenPipeError):  # ASCII, as JSON is
        _answer_all(out)


def _answer_all(out: IO[str]) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        # Seconds of the processor, after which the system ends this process.
        signal.setitimer(signal.ITIMER_PROF, request.pop("seconds"))
        answer = answer_request(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=out, flush=True)
