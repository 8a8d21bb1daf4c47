"""Prompts from files: texts, conversations that wait for an answer, or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from nemo_hybrid.data.chat import Conversation, read_question, refuse_fields
from nemo_hybrid.data.readers import integers, plain_text, read_records
from nemo_hybrid.data.sources import BadRecord, Record, Unusable, find_samples
from nemo_hybrid.data.template import ChatTemplate, load_template, need_template
from nemo_hybrid.data.tokenizer import TextTokenizer
from nemo_hybrid.errors import UserError

_KINDS = ("prompt", "messages", "input_ids")


@dataclass(frozen=True)
class Prompt:
    """``number``: what tells it from the others, in whatever order they stand: its id, or without
    one its place in the file, from 0."""

    number: int | str
    ids: list[int]


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts for a model that knows ``vocab_size`` tokens and texts of ``longest`` tokens,
    of which ``new`` are to be generated. ``directory``: the tokenizer's."""

    directory: Path
    tokenizer: TextTokenizer | None
    vocab_size: int
    longest: int
    new: int

    def read_file(self, path: str) -> list[Prompt]:
        """All prompts of a file. Raises UserError for the first that is none."""
        found: dict[int | str, Prompt] = {}
        sources = find_samples([path]).sources
        records = chain.from_iterable(read_records(source, "prompt") for source in sources)
        for place, record in enumerate(records):
            try:
                if isinstance(record, Unusable):
                    raise BadRecord(record.why)
                prompt = self._prompt(record, place)
            except BadRecord as e:
                raise UserError(f"{record.where}: {e}") from e
            if prompt.number in found:
                raise UserError(f"{record.where}: two prompts have the id {prompt.number!r}")
            found[prompt.number] = prompt
        if not found:
            raise UserError(f"{path} holds no prompts")
        return list(found.values())

    def text(self, text: str) -> list[int]:
        """Ids of a text that is to be continued. Raises BadRecord."""
        return self._checked(self._needed.encode_prompt(text).tolist())

    def chat(self, conversation: Conversation) -> list[int]:
        """Ids that ask for the next answer in a conversation. Raises BadRecord."""
        text = self._template.ask(conversation)
        return self._checked(self._needed.encode_chat(text)[0].tolist())

    def _prompt(self, record: Record, place: int) -> Prompt:
        content = {k: v for k, v in record.content.items() if v is not None}
        kinds = [kind for kind in _KINDS if kind in content]
        if len(kinds) != 1:
            what = " and ".join(kinds) or ", ".join(content) or "nothing"
            raise BadRecord(f"a prompt has one of the fields {', '.join(_KINDS)}, this has {what}")
        number = content.get("id", place)
        if not isinstance(number, int | str) or isinstance(number, bool):
            raise BadRecord(f"the id {number!r} is neither a whole number nor text")
        value = content[kinds[0]]
        talk = kinds[0] == "messages" or (kinds[0] == "prompt" and isinstance(value, list))
        refuse_fields(content, conversation=talk)
        if talk:
            return Prompt(number, self.chat(read_question(content, value)))
        if kinds[0] == "input_ids":
            return Prompt(number, self._checked(integers(value, "input_ids").tolist()))
        return Prompt(number, self.text(plain_text(value, "prompt")))

    @property
    def _needed(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise UserError(
                f"{self.directory} has no tokenizer.json, so no text can be read: give input_ids"
            )
        return self.tokenizer

    @cached_property
    def _template(self) -> ChatTemplate:
        return need_template(load_template(self._needed, self.directory), self.directory)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        if not ids:
            raise BadRecord("the prompt is empty: give at least one token to continue")
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            token = outside[0]
            known = self.tokenizer.decode([token]) if self.tokenizer and token > 0 else ""
            known = f" ({known!r})" if known else ""
            raise BadRecord(
                f"the prompt holds token {token}{known}, beyond the model's vocab_size "
                f"{self.vocab_size}"
            )
        if len(ids) + self.new > self.longest:
            raise BadRecord(
                f"the prompt has {len(ids)} tokens; with {self.new} new ones (max_new_tokens) that "
                f"exceeds the {self.longest} that the model is made for (max_position_embeddings)"
            )
        return list(ids)
