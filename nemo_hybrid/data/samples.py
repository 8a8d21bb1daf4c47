"""Records to samples for fine-tuning, and samples to a store.

A sample is ids [n] and targets [n]: True where a loss is taken when the token is predicted, which
the first token never is. One record gives one sample, or several: a conversation whose template
rewrites history, a pack.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.data.chat import (
    OF_CONVERSATIONS,
    Conversation,
    check_answers,
    is_empty,
    read_conversation,
    refuse_fields,
    says_something,
)
from nemo_hybrid.data.making import (
    Summary,
    draw,
    making,
    reading,
    recorded,
    split_of,
    stands,
)
from nemo_hybrid.data.readers import integers, plain_text, read_records
from nemo_hybrid.data.reasoning import (
    TAG,
    Message,
    change_reasoning,
    check_tags,
    learnt_parts,
)
from nemo_hybrid.data.sources import (
    BadRecord,
    Record,
    Source,
    Unusable,
    content_files,
    find_samples,
)
from nemo_hybrid.data.store import HELDOUT, TRAIN
from nemo_hybrid.data.template import Rendering, load_template, need_template
from nemo_hybrid.data.template_files import files_with
from nemo_hybrid.data.tokenizer import CHAT_TEMPLATE, TextTokenizer, load_tokenizer
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import hash_file

PAIR = "prompt and completion"
ROLLOUT = "rollout"
"""What `nemo-hybrid rollout` writes; its text only tells whether the tokenizer is the same."""
_OF_ROLLOUTS = ("prompt", "sample", "logprobs", "text", "ended")


@dataclass(frozen=True)
class Sample:
    ids: NDArray[np.int64]
    targets: NDArray[np.bool_]

    @property
    def learnt(self) -> int:
        return int(self.targets[1:].sum())


@dataclass
class Made:
    """What became of one record."""

    key: str
    where: str
    done: float = 0.0
    kind: str = ""
    """messages, prompt and completion, text, pack or rollout; empty where the record is none."""
    samples: list[Sample] = field(default_factory=list)
    parts: int = 0
    """Samples of it, whether usable or not."""
    unusable: list[Unusable] = field(default_factory=list)
    truncated: int = 0
    unread: Set[str] = frozenset()
    """Fields that no rule knows."""


class SampleMaker:
    """Turns records into samples by the tokenizer and the chat template of a directory.

    Raises UserError for files that are none.
    """

    def __init__(self, options: SampleOptions, directory: str | Path, seed: int) -> None:
        self.options = options
        self.directory = directory
        self.seed = seed
        self.tokenizer = load_tokenizer(directory)
        self.template = load_template(self.tokenizer, directory, options.chat_template)
        self._kinds = {
            "messages": ("messages",),
            PAIR: ("prompt", "completion"),
            "text": (options.text_field,),
            "pack": ("input_ids", "loss_mask", "seq_start_id"),
            ROLLOUT: ("prompt_ids", "ids", "chosen"),
        }

    @cached_property
    def stored_tokenizer(self) -> TextTokenizer:
        """The tokenizer with the template that was used among its files."""
        if self.template is None:
            return self.tokenizer
        files = files_with(self.template.sources, self.tokenizer.files)
        return replace(self.tokenizer, files=files)

    def read(self, sources: Iterable[Source]) -> Iterator[Made]:
        """What becomes of every record. Raises UserError for a source that cannot be read."""
        for source in sources:
            for record in read_records(source, self.options.text_field):
                if isinstance(record, Unusable):
                    yield Made("", record.where, unusable=[record])
                else:
                    yield self.make(record)

    def make(self, record: Record) -> Made:
        """Samples of a record, and what is wrong with it. Raises UserError for a conversation if
        there is no template, or none that can be compiled."""
        made = Made(record.key, record.where, record.done)
        try:
            made.kind, samples = self._samples(record, made)
        except BadRecord as e:
            made.unusable.append(Unusable(record.where, str(e), e.kind))
            return made
        made.parts, longest = len(samples), self.options.sequence_length
        for number, sample in enumerate(samples, 1):
            where = record.where + (f" sample {number}" if made.parts > 1 else "")
            if len(sample.ids) > longest and self.options.truncate:
                sample = Sample(sample.ids[:longest], sample.targets[:longest])
                made.truncated += 1
            if len(sample.ids) > longest:
                why = f"{len(sample.ids)} tokens exceed sequence_length {longest}"
                made.unusable.append(Unusable(where, why, "over-long"))
            elif not sample.learnt:
                why = f"nothing is learnt of its {len(sample.ids)} tokens"
                why += " after truncation" if made.truncated else ""
                made.unusable.append(Unusable(where, why, "all-masked"))
            else:
                made.samples.append(sample)
        return made

    def _samples(self, record: Record, made: Made) -> tuple[str, list[Sample]]:
        content = {k: v for k, v in record.content.items() if v is not None}
        kinds = [kind for kind, keys in self._kinds.items() if content.keys() >= set(keys)]
        if ROLLOUT in kinds:  # its text is that of its ids
            kinds = [kind for kind in kinds if kind != "text"]
        if len(kinds) != 1:
            has = ", ".join(content) or "nothing"
            kinds_known = "; ".join(", ".join(keys) for keys in self._kinds.values())
            why = f"of two kinds at once ({' and '.join(kinds)})" if kinds else "of no known kind"
            raise BadRecord(f"{why}: it has {has}; the kinds are: {kinds_known}", "unknown kind")
        kind = kinds[0]
        value = [content[key] for key in self._kinds[kind]]
        talk = kind == "messages" or all(kind == PAIR and isinstance(v, list) for v in value)
        refuse_fields(content, conversation=talk)
        known = {*self._kinds[kind], *(OF_CONVERSATIONS if talk else ())}
        known |= {*(_OF_ROLLOUTS if kind == ROLLOUT else ())}
        made.unread = {name for name, v in content.items() if says_something(v)} - known
        if talk:
            said, first = (value[0] + value[1], len(value[0])) if kind == PAIR else (value[0], 0)
            conversation = read_conversation(content, said, first)
            samples = self._conversation(record.key, conversation, made)
        elif kind == "text":
            text = plain_text(value[0], self.options.text_field)
            self._no_reasoning(text)
            samples = [self._joined(np.empty(0, np.int64), text)]
        elif kind == "pack":
            samples = self._unpacked(integers(value[0], "input_ids"), *value[1:])
        elif kind == ROLLOUT:
            samples = [self._said(content, *map(integers, value, self._kinds[ROLLOUT]))]
        else:
            prompt, completion = map(plain_text, value, self._kinds[PAIR])
            self._no_reasoning(completion)
            check_tags(prompt + completion)
            samples = [self._joined(self.tokenizer.encode([prompt])[0], completion)]
        return kind, samples

    def _no_reasoning(self, text: str) -> None:
        """Raise BadRecord for reasoning in plain text, if it is not to be learnt like the rest."""
        options = self.options
        changed = options.strip_reasoning or options.truncate_reasoning
        if TAG.search(text) and (options.reasoning != "keep" or changed):
            raise BadRecord("reasoning in plain text can only be kept: write messages", "reasoning")

    def _joined(self, before: NDArray[np.int64], text: str) -> Sample:
        """``before`` and then a text that is learnt, and the end of it."""
        if not text:
            raise BadRecord("the text is empty")
        own = self.tokenizer.encode([text], opened=not len(before))[0]
        learnt = np.append(own, self.tokenizer.eos_id)
        ids = np.concatenate([before, learnt])
        return Sample(ids, np.arange(len(ids)) >= max(1, len(before)))

    def _conversation(self, key: str, given: Conversation, made: Made) -> list[Sample]:
        """Of which the assistant's turns say whether they are learnt."""
        template = need_template(self.template, self.directory, ", or name one as chat_template")
        check_answers(given.messages)
        template.check([given.messages, given.tools, given.options])
        chosen = draw(self.seed, f"reasoning/{key}")
        stripped = self.options.reasoning == "strip" or chosen < self.options.strip_reasoning
        beyond = self.options.strip_reasoning + self.options.truncate_reasoning
        cut = not stripped and chosen < beyond
        if stripped:
            given = given.changed(lambda _, m: self._without_reasoning(m))
            check_answers(given.messages, " without its reasoning")
        elif cut:
            given = given.changed(lambda i, m: self._cut_reasoning(m, f"{key}/{i}"))
        if cut or self.options.reasoning == "mask":
            _no_tags_in_calls(given)
        renderings, unread = template.split(given)
        made.unread = made.unread | {f"messages.{name}" for name in unread}
        return [self._encoded(r, cut) for r in renderings]

    def _without_reasoning(self, message: Message) -> Message:
        stripped = change_reasoning(message, lambda _: "")
        # Chance must not make an answer of reasoning alone an empty one.
        kept = is_empty(stripped) and self.options.reasoning != "strip"
        return message if kept else stripped

    def _cut_reasoning(self, message: Message, key: str) -> Message:
        """The message with its reasoning cut before a token, any but the first."""

        def cut(reasoning: str) -> str:
            starts = self.tokenizer.encode_chat(reasoning)[1][:, 0]
            at = 1 + int(draw(self.seed, f"cut/{key}") * (len(starts) - 1))
            return reasoning[: starts[at]] or reasoning if at < len(starts) else reasoning

        return change_reasoning(message, cut)

    def _encoded(self, rendering: Rendering, cut: bool) -> Sample:
        """A token is learnt if it holds a character that is."""
        ids, offsets = self.tokenizer.encode_chat(rendering.text)
        learnt = np.zeros(len(rendering.text) + 2, np.int64)
        masked = self.options.reasoning == "mask"
        for span in rendering.spans:
            parts = learnt_parts(rendering.text, span, masked) if masked or cut else [span]
            for start, stop in parts:
                learnt[start + 1 : stop + 1] = 1
        before = learnt.cumsum()  # learnt characters before each
        # A token of no characters counts like the character that follows.
        stops = np.maximum(offsets[:, 1], offsets[:, 0] + 1)
        targets = before[stops] > before[offsets[:, 0]]
        targets[:1] = False
        return Sample(ids, targets)

    def _said(
        self,
        row: dict[str, Any],
        before: NDArray[np.int64],
        said: NDArray[np.int64],
        chosen: NDArray[np.int64],
    ) -> Sample:
        """What the model chose of a row that `rollout` wrote, the token that ended it included."""
        if len(said) != len(chosen):
            raise BadRecord(f"{len(chosen)} entries of chosen for {len(said)} of ids")
        ids, targets = np.append(before, said), np.append(0 * before, chosen) == 1
        self._check_ids(ids)
        shown = said[:-1] if row.get("ended") == "stop" else said
        text = self.tokenizer.decode(shown.tolist())
        if row.get("text", text) != text:
            raise BadRecord(f"the tokenizer of {self.directory} reads other text in its ids")
        self._no_reasoning(text)
        targets[:1] = False
        return Sample(ids, targets)

    def _unpacked(self, ids: NDArray[np.int64], mask: Any, starts: Any) -> list[Sample]:
        """Samples of a pack; seq_start_id: where each begins."""
        learnt, begins = integers(mask, "loss_mask"), integers(starts, "seq_start_id")
        if len(learnt) != len(ids):
            raise BadRecord(f"{len(learnt)} entries of loss_mask for {len(ids)} of input_ids")
        if ((learnt != 0) & (learnt != 1)).any():
            raise BadRecord("loss_mask holds other numbers than 0 and 1")
        self._check_ids(ids)
        ends = np.append(begins[1:], len(ids))
        if not len(begins) or begins[0] != 0 or (ends <= begins).any():
            raise BadRecord(f"seq_start_id must start at 0 and ascend below {len(ids)}")
        samples = []
        for start, stop in zip(begins.tolist(), ends.tolist(), strict=True):
            targets = learnt[start:stop] == 1
            if self.options.packed_mask == "labels":
                if targets[-1]:
                    raise BadRecord(
                        f"loss_mask {stop - 1} is 1, but no token of the sample follows: if the "
                        "mask speaks of the tokens themselves, set packed_mask tokens"
                    )
                targets = np.roll(targets, 1)
            targets[0] = False
            samples.append(Sample(ids[start:stop], targets))
        return samples

    def _check_ids(self, ids: NDArray[np.int64]) -> None:
        vocab_size = self.tokenizer.vocab_size
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if len(outside):
            raise BadRecord(f"token id {outside[0]} lies outside the vocabulary of {vocab_size}")


def prepare_samples(
    options: SampleOptions,
    paths: Sequence[str | Path],
    tokenizer_dir: str | Path,
    out: Path,
    *,
    heldout_paths: Sequence[str | Path] = (),
    seed: int,
    vocab_size: int | None = None,
    progress: bool = True,
    reuse: bool = False,
) -> Summary:
    """Read records once and write the sample stores out/train and out/heldout, the tokenizer and
    the chat template.

    Records are held out by a hash of seed, path and line or row number, or are those of
    ``heldout_paths``. ``vocab_size``: rows of the embedding of the model that is trained.
    ``reuse``: return the summary of an existing store of the same data and options.

    Raises UserError. Nothing appears under out until everything is written.
    """
    started = time.monotonic()
    options.validate()
    maker = SampleMaker(options, tokenizer_dir, seed)
    if vocab_size is not None and maker.tokenizer.vocab_size > vocab_size:
        last = maker.tokenizer.decode([maker.tokenizer.vocab_size - 1])
        raise UserError(
            f"the tokenizer of {tokenizer_dir} has {maker.tokenizer.vocab_size} entries, {last} as "
            f"the last, but the model's embedding has only {vocab_size}: they do not belong "
            "together, or the tokenizer's settings declare tokens that the model has not"
        )
    found, found_heldout = find_samples(paths), find_samples(heldout_paths)
    train, heldout = found.sources, found_heldout.sources
    existing = stands(out, reuse)
    request = _request(maker, {TRAIN: train, HELDOUT: heldout})
    if existing:
        return recorded(out, request, "samples", "name another run_dir")
    summary = Summary(str(out), maker.tokenizer.vocab_size, "samples")
    for kind, path in found.left_out + found_heldout.left_out:
        summary.leave_out(kind, path)
    with making(out, request, maker.stored_tokenizer, summary) as writers:

        def write(title: str, sources: list[Source], share: float) -> None:
            for made in reading(title, sources, lambda source: maker.read([source]), progress):
                _count(made, summary)
                split = split_of(made.key, seed, share)
                for sample in made.samples:
                    writers[split].add(sample.ids, sample.targets)
                    summary.learnt[split] = summary.learnt.get(split, 0) + sample.learnt
                    summary.longest = max(summary.longest, len(sample.ids))

        write("prepare: samples", train, 0.0 if heldout else options.heldout)
        if heldout:
            write("prepare: held-out samples", heldout, 1.0)
        summary.check(options.skip_bad)
        summary.sources = {
            "files": len(train) + len(heldout),
            "records": summary.records,
            "dropped": summary.dropped,
        }
        summary.seconds = time.monotonic() - started
    return summary


def _count(made: Made, summary: Summary) -> None:
    """Count what became of a record, but for the samples themselves."""
    if made.kind:
        summary.records[made.kind] = summary.records.get(made.kind, 0) + 1
    summary.truncated += made.truncated
    summary.split_conversations += made.parts > 1 and made.kind != "pack"
    for name in sorted(made.unread):
        summary.unread[name] = summary.unread.get(name, 0) + 1
    for fault in made.unusable:
        summary.drop(fault)


def _request(maker: SampleMaker, sources: dict[str, list[Source]]) -> dict[str, Any]:
    """All that a store's content follows from."""
    hashes = {
        f"{split} data": [
            [source.key, *(hash_file(file) for file in content_files(source))] for source in found
        ]
        for split, found in sources.items()
    }
    template = maker.template
    return {
        **{f.name: getattr(maker.options, f.name) for f in fields(SampleOptions)},
        **hashes,
        "chat_template": template and template.sha256,
        "tokenizer": {
            name: hashlib.sha256(content).hexdigest()
            for name, content in maker.stored_tokenizer.files.items()
            if name != CHAT_TEMPLATE
        },
        "seed": maker.seed,
    }


def _no_tags_in_calls(given: Conversation) -> None:
    """Raise BadRecord for tags of thinking in calls that are learnt, where reasoning is not: in a
    rendered text they are like those of reasoning."""
    for turn in given.learnt:
        if TAG.search(json.dumps(given.messages[turn].get("tool_calls"), ensure_ascii=False)):
            why = f"turn {turn + 1}: a tool call holds a tag of thinking"
            raise BadRecord(f"{why}: reasoning can only be kept", "reasoning")
