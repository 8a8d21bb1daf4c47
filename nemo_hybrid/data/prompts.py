"""Prompts from files: texts, conversations that wait for an answer, or token ids.

A row may hold anything besides, such as what judges the answer. Rows of NeMo Gym are read as they
are: the conversation in ``responses_create_params``, the environment in ``agent_ref``.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from nemo_hybrid.data.chat import (
    OF_CONVERSATIONS,
    Conversation,
    read_question,
    refuse_fields,
)
from nemo_hybrid.data.readers import integers, plain_text, read_records
from nemo_hybrid.data.reasoning import END_OF_THINKING, THINK, Message
from nemo_hybrid.data.sources import BadRecord, Record, Unusable, find_samples
from nemo_hybrid.data.template import ChatTemplate, load_template, need_template
from nemo_hybrid.data.tokenizer import TextTokenizer
from nemo_hybrid.errors import UserError

T = TypeVar("T")
_KINDS = ("prompt", "messages", "input_ids")
_BUDGET = "thinking_budget"
_GYM = "responses_create_params"
_ASKED = {*_KINDS, _GYM, *OF_CONVERSATIONS}
_READ = {*_ASKED, _BUDGET, "id", "answer", "environment", "agent_ref"}


@dataclass(frozen=True)
class Prompt:
    """``number``: what tells it from the others, in whatever order they stand: its id, or without
    one its place in the file, from 0. ``budget``: the most tokens of thinking after it, if there is
    a limit; ``thinks``: whether it then ends in thinking."""

    number: int | str
    ids: list[int]
    budget: int | None = None
    thinks: bool = False
    row: Mapping[str, Any] = field(default_factory=dict)
    """All that the file says of it."""
    where: str = ""
    """For messages: file and line."""

    @property
    def environment(self) -> str | None:
        """What judges answers to it, where the row says so."""
        named = self.row.get("environment")
        agent = self.row.get("agent_ref")
        if named is None and isinstance(agent, dict):
            named = agent.get("name")
        return None if named is None else str(named)


def read_answers(path: str) -> tuple[dict[int | str, str | None], str]:
    """The field ``answer``, a text or a whole number, of every prompt of a file by its number, None
    where there is none; and the digest of what they ask. Raises UserError for the first that is
    neither."""
    rows: list[tuple[int | str, Mapping[str, Any]]] = []

    def answer(record: Record, number: int | str) -> str | None:
        rows.append((number, record.content))
        found = record.content.get("answer")
        if found is not None and (not isinstance(found, int | str) or isinstance(found, bool)):
            raise BadRecord(f"the answer {found!r} is neither text nor a whole number")
        return None if found is None else str(found)

    answers = _by_number(path, answer)
    return answers, asked_digest(rows)


def asked_digest(rows: Iterable[tuple[int | str, Mapping[str, Any]]]) -> str:
    """Of what prompts ask, by their numbers: in whatever order, and whatever else rows say."""
    asked = [(n, {k: row[k] for k in _ASKED if row.get(k) is not None}) for n, row in rows]
    lines = sorted(json.dumps(one, sort_keys=True, default=str) for one in asked)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def unread_fields(prompts: Iterable[Prompt]) -> Counter[str]:
    """How many rows have each field that nobody reads."""
    return Counter(n for p in prompts for n, v in p.row.items() if n not in _READ and v is not None)


def _by_number(
    path: str, read: Callable[[Record, int | str], T], faults: list[str] | None = None
) -> dict[int | str, T]:
    """What ``read`` makes of every prompt of a file and its number. Raises UserError for the first
    of which it raises BadRecord, and for ids that are none or come twice; or adds to ``faults``
    what is wrong with such."""
    found: dict[int | str, T] = {}
    sources = find_samples([path]).sources
    records = chain.from_iterable(read_records(source, "prompt") for source in sources)
    for place, record in enumerate(records):
        try:
            if isinstance(record, Unusable):
                raise BadRecord(record.why + record.detail)
            number = record.content.get("id")
            number = place if number is None else number
            if not isinstance(number, int | str) or isinstance(number, bool):
                raise BadRecord(f"the id {number!r} is neither a whole number nor text")
            if number in found:
                raise BadRecord(f"two prompts have the id {number!r}")
            found[number] = read(record, number)
        except BadRecord as e:
            if faults is None:
                raise UserError(f"{record.where}: {e}") from e
            faults.append(f"{record.where}: {e}")
    if not found:
        raise UserError(f"{path} holds no prompts")
    return found


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts for a model that knows ``vocab_size`` tokens and texts of ``longest`` tokens,
    of which ``new`` are to be generated. ``directory``: the tokenizer's. ``switch``: whether the
    template is to ask for thinking; ``budget``: of prompts that name none; ``markers``: texts
    that open and close thinking, where they are not those of the template; ``limits``: what sets
    ``new`` and ``longest``, for messages."""

    directory: Path
    tokenizer: TextTokenizer | None
    vocab_size: int
    longest: int
    new: int
    switch: bool | None = None
    budget: int | None = None
    markers: tuple[str, str] | None = None
    limits: tuple[str, str] = (
        "max_new_tokens",
        "that the model is made for (max_position_embeddings)",
    )

    def read_file(self, path: str, faults: list[str] | None = None) -> list[Prompt]:
        """All prompts of a file. Raises UserError for the first that is none, or adds to
        ``faults`` what is wrong with those that are none."""

        def read(record: Record, number: int | str) -> Prompt:
            prompt = self._prompt(record, number)
            return replace(prompt, row=record.content, where=record.where)

        return list(_by_number(path, read, faults).values())

    def text(self, text: str, number: int | str = 0, budget: int | None = None) -> Prompt:
        """A text that is to be continued. Raises BadRecord."""
        return self._made(number, self._needed.encode_prompt(text).tolist(), budget)

    def chat(
        self, conversation: Conversation, number: int | str = 0, budget: int | None = None
    ) -> Prompt:
        """What asks for the next answer in a conversation. Raises BadRecord."""
        if self.switch is not None:
            name = self._template.thinking_switch(conversation.tools)
            options = {name: self.switch, **conversation.options}
            conversation = replace(conversation, options=options)
        text = self._template.ask(conversation)
        return self._made(number, self._needed.encode_chat(text)[0].tolist(), budget, asked=text)

    @cached_property
    def marker_ids(self) -> tuple[list[int], list[int]]:
        """Tokens that open and that close thinking. Raises UserError where it is not known which
        they are, or the tokenizer has them not."""
        if self.tokenizer is None:
            raise UserError(
                f"{_BUDGET}: {self.directory} has no tokenizer.json, so nothing says which tokens "
                "open and close thinking"
            )
        opening, closing = self._marker_texts
        return self._marker(opening, self.tokenizer), self._marker(closing, self.tokenizer)

    def _prompt(self, record: Record, number: int | str) -> Prompt:
        content = dict(record.content)
        if content.get(_GYM) is not None:
            content |= _asked(content.pop(_GYM))
        content = {k: v for k, v in content.items() if v is not None}
        kinds = [kind for kind in _KINDS if kind in content]
        if len(kinds) != 1:
            what = " and ".join(kinds) or ", ".join(content) or "nothing"
            raise BadRecord(f"a prompt has one of the fields {', '.join(_KINDS)}, this has {what}")
        budget = content.get(_BUDGET)
        if budget is not None and (type(budget) is not int or budget < 0):
            raise BadRecord(f"{_BUDGET} {budget!r} is no whole number of 0 or more")
        value = content[kinds[0]]
        talk = kinds[0] == "messages" or (kinds[0] == "prompt" and isinstance(value, list))
        refuse_fields(content, conversation=talk)
        if self.tokenizer is None and kinds[0] != "input_ids":
            raise BadRecord(f"{self.directory} has no tokenizer.json: give rows of input_ids")
        if talk:
            return self.chat(read_question(content, value), number, budget)
        if self.switch is not None:
            raise BadRecord("--thinking is for conversations, this is none")
        if kinds[0] == "input_ids":
            return self._made(number, integers(value, "input_ids").tolist(), budget)
        return self.text(plain_text(value, "prompt"), number, budget)

    @property
    def template_text(self) -> str:
        """The chat template. Raises UserError where there is none."""
        return self._template.source()

    def written(self, messages: Sequence[Message], **options: bool) -> str:
        """What the chat template makes of messages. Raises UserError where there is none."""
        return self._template.render(messages, **options)

    @property
    def _needed(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise UserError(
                f"{self.directory} has no tokenizer.json, so no text can be read; rows of a file "
                "of prompts may give input_ids"
            )
        return self.tokenizer

    @cached_property
    def _template(self) -> ChatTemplate:
        return need_template(load_template(self._needed, self.directory), self.directory)

    @property
    def _marker_texts(self) -> tuple[str, str]:
        if self.markers:
            return self.markers
        template = load_template(self._needed, self.directory)
        sources = "".join(template.sources.values()) if template else ""
        if THINK not in sources or END_OF_THINKING not in sources:
            raise UserError(
                f"{_BUDGET}: no chat template in {self.directory} writes {THINK} and "
                f"{END_OF_THINKING}: name what opens and closes the model's thinking "
                "(--thinking_markers), if it thinks"
            )
        return THINK, END_OF_THINKING

    def _marker(self, text: str, tokenizer: TextTokenizer) -> list[int]:
        """Other tokens could be merged with what stands beside them: text has no marker then."""
        ids: list[int] = tokenizer.encode_chat(text)[0].tolist()
        ends = [tokenizer.decode([token]) for token in (ids[:1] + ids[-1:])]
        if not ids or any(end not in tokenizer.added_tokens for end in ends):
            raise UserError(
                f"{_BUDGET}: the tokenizer of {self.directory} has no tokens of its own (added "
                f"tokens) that {text} begins and ends with, so it would not be recognised"
            )
        if max(ids) >= self.vocab_size:
            raise UserError(
                f"{_BUDGET}: {text} is token {max(ids)}, beyond the model's vocab_size "
                f"{self.vocab_size}"
            )
        return ids

    def _made(
        self, number: int | str, ids: list[int], budget: int | None, asked: str | None = None
    ) -> Prompt:
        """``asked``: the text that a template wrote."""
        ids, budget = self._checked(ids), self.budget if budget is None else budget
        if budget is None:
            return Prompt(number, ids)
        opening, closing = self.marker_ids
        if asked is not None:  # what was said before may hold markers too
            thinks = asked.rstrip().endswith(self._marker_texts[0])
        else:
            thinks = _last(opening, ids) > _last(closing, ids)
        return Prompt(number, ids, budget, thinks)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        if not ids:
            raise BadRecord("the prompt is empty: give at least one token to continue")
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            token = outside[0]
            known = self.tokenizer.decode([token]) if self.tokenizer and token > 0 else ""
            known = f" ({known!r})" if known else ""
            where = "below 0" if token < 0 else f"beyond the model's vocab_size {self.vocab_size}"
            raise BadRecord(f"the prompt holds token {token}{known}, {where}")
        if len(ids) + self.new > self.longest:
            raise BadRecord(
                f"the prompt has {len(ids)} tokens; with {self.new} new ones ({self.limits[0]}) "
                f"that exceeds the {self.longest} {self.limits[1]}"
            )
        return list(ids)


def _asked(request: object) -> dict[str, Any]:
    """Fields of a conversation, from a request to OpenAI's interface of responses. Raises
    BadRecord."""
    if not isinstance(request, dict) or "input" not in request:
        raise BadRecord(f"{_GYM} has no input")
    said, tools = request["input"], request.get("tools")
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    if isinstance(tools, list):  # there functions stand without a wrapping
        tools = [
            {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
            if isinstance(tool, dict) and "function" not in tool
            else tool
            for tool in tools
        ]
    return {"messages": messages, "tools": tools or None, "system": request.get("instructions")}


def _last(some: Sequence[int], ids: Sequence[int]) -> int:
    """Where some tokens begin for the last time; -1: nowhere."""
    places = range(len(ids) - len(some), -1, -1)
    return next((place for place in places if ids[place : place + len(some)] == some), -1)
