"""What the making of stores has in common, of documents and of samples: they appear whole or not
at all, are found again by what was asked for, and everything that did not go into them is counted.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from nemo_hybrid.data.sources import Source, Unusable
from nemo_hybrid.data.store import HELDOUT, RECORD, TRAIN, Store, StoreWriter
from nemo_hybrid.data.tokenizer import TextTokenizer
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming, whole_directory, write_file
from nemo_hybrid.terminal import progress_bar


class Item(Protocol):
    @property
    def done(self) -> float:
        """Fraction of its source read so far, 0 where that is not known."""


Read = TypeVar("Read", bound=Item)
NAMED = 5
"""Examples of every kind of fault, and places of each of them."""


@dataclass
class Summary:
    """What was made and what was left out, as prepare.json keeps it."""

    out: str
    vocab_size: int
    what: Literal["documents", "samples"]
    entries: dict[str, int] = field(default_factory=dict)
    """Documents or samples of each split; and so on."""
    tokens: dict[str, int] = field(default_factory=dict)
    learnt: dict[str, int] = field(default_factory=dict)
    """Of samples only."""
    longest: int = 0
    """Tokens of the longest sample."""
    records: dict[str, int] = field(default_factory=dict)
    """That gave samples, by kind."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Records and samples that cannot be learnt from, by reason."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Other things that are no data, by what they are."""
    noted: dict[str, int] = field(default_factory=dict)
    """Documents that were taken, and are not what one would expect."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first of each."""
    unread: dict[str, int] = field(default_factory=dict)
    """Records with a field that no rule knows, by its name."""
    truncated: int = 0
    split_conversations: int = 0
    """Conversations that gave several samples, because their template rewrites history."""
    sources: dict[str, Any] = field(default_factory=dict)
    """What store.json says of where the tokens come from."""
    seconds: float = 0.0
    reused: bool = False
    """True where existing stores of the same request were taken as they are."""

    def __post_init__(self) -> None:
        self._places: dict[str, dict[str, list[str]]] = {}  # by kind of fault, and by reason

    def drop(self, fault: Unusable) -> None:
        """Count a record or sample that cannot be learnt from. A reason that repeats is told
        once, with its first places."""
        self.dropped[fault.kind] = self.dropped.get(fault.kind, 0) + 1
        reasons = self._places.setdefault(fault.kind, {})
        if fault.why in reasons or len(reasons) < NAMED:
            places = reasons.setdefault(fault.why, [])
            if len(places) < NAMED:
                places.append(fault.where)
            self.examples[fault.kind] = [f"{_listed(p)}: {why}" for why, p in reasons.items()]

    def leave_out(self, kind: str, name: object) -> None:
        """Count something that is no data; ``kind``: in the plural."""
        self._count(self.left_out, kind, str(name))

    def note(self, kind: str, name: object) -> None:
        """Count something that is taken as it is; ``kind``: in the plural."""
        self._count(self.noted, kind, str(name))

    def _count(self, counts: dict[str, int], kind: str, example: str) -> None:
        counts[kind] = counts.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < NAMED:
            examples.append(example)

    def check(self, skip_bad: bool) -> None:
        """Raise UserError if anything was dropped that may not be."""
        if self.dropped and not skip_bad:
            advice = "Mend the input, or skip and count them with skip_bad true"
            if "over-long" in self.dropped:
                advice += " (over-long ones: raise sequence_length, or cut them with truncate true)"
            raise UserError(
                f"{sum(self.dropped.values()):,} records or {self.what} cannot be learnt from:\n"
                f"{self._faults}\n{advice}"
            )

    def check_splits(self, heldout: float) -> None:
        """Raise UserError if a split is empty."""
        total = sum(self.entries.values())
        if not total:
            faults = f":\n{self._faults}" if self.dropped or self.left_out else ""
            raise UserError(f"there is nothing to learn from in the named paths{faults}")
        for split, count in self.entries.items():
            if not count:
                raise UserError(
                    f"none of the {total} {self.what} falls into the {split} split at heldout "
                    f"{heldout}: give more {self.what}, another heldout fraction or seed, or "
                    "heldout 0 for no held-out split (and, in training, train.eval_sequences 0)"
                )

    @property
    def _faults(self) -> str:
        """Everything dropped or left out, counted by reason and named."""
        lines = []
        for kind, count in (self.dropped | self.left_out).items():
            places = self._places.get(kind, {}).values()
            more = count - (sum(map(len, places)) or len(self.examples[kind]))
            named = [*self.examples[kind], *([f"and {more:,} more"] if more else [])]
            several = len(self.examples[kind]) > 1 and kind in self.dropped
            between, begin = ("\n    ", "\n    ") if several else ("; ", " ")
            lines.append(f"  {count:,} {kind}:{begin}{between.join(named)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [f"{self.out}: {'reused, ' if self.reused else ''}vocabulary {self.vocab_size:,}"]

        def line(word: str, count: int, what: str) -> None:
            if count:
                lines.append(f"  {word:<8} {count:>14,} {what}")

        for split, word in ((TRAIN, "train"), (HELDOUT, "held out")):
            learnt = f", {self.learnt[split]:,} learnt" if split in self.learnt else ""
            made = f"tokens in {self.entries.get(split, 0):,} {self.what}{learnt}"
            line(word, self.tokens.get(split, 0), made)
        line("longest", self.longest, "tokens")
        for kind, count in self.records.items():
            line("read", count, f"records: {kind}")
        for name, count in self.unread.items():
            line("unread", count, f"records: the field {name}")
        line("split", self.split_conversations, "conversations, into several samples each")
        line("cut", self.truncated, "over-long samples")
        of_words = {"dropped": self.dropped, "left out": self.left_out, "noted": self.noted}
        for word, counts in of_words.items():
            for kind, count in counts.items():
                line(word, count, kind)
                lines += [f"    {example}" for example in self.examples[kind]]
        return "\n".join(lines)


def _listed(places: Sequence[str]) -> str:
    """Places, of the same file by their numbers alone: ``a.jsonl line 1, 2; b.jsonl line 1``."""
    out, before = "", None
    for place in places:
        source, _, number = place.rpartition(" ")
        out += f", {number}" if source == before else f"; {place}" if out else place
        before = source
    return out


def draw(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on both and is the same everywhere."""
    digest = hashlib.sha256(f"{seed}/{key}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(key: str, seed: int, heldout: float) -> str:
    return HELDOUT if draw(seed, key) < heldout else TRAIN


def reading(
    title: str, sources: Sequence[Source], read: Callable[[Source], Iterable[Read]], show: bool
) -> Iterator[Read]:
    """What ``read`` finds in the sources; ``show``: how far it is, by what the items say."""
    before, done = 0, 0.0
    with progress_bar(title, max(1, sum(s.size for s in sources)), show) as update:
        for source in sources:
            for item in read(source):
                done = max(done, before + item.done * source.size)
                update(done)
                yield item
            before += source.size


def stands(out: Path, reuse: bool) -> bool:
    """Whether something stands at ``out``, other than an empty directory. Raises UserError if it
    does and may not be reused."""
    with naming("write", out):
        free = not out.is_symlink() and not out.is_file()
        free = free and (not out.is_dir() or not any(out.iterdir()))
    if not free and not reuse:
        raise UserError(f"{out} exists already; name another --out or remove it first")
    return not free


def recorded(
    out: Path, request: dict[str, Any], what: Literal["documents", "samples"], mend: str
) -> Summary:
    """What prepare.json tells of sound stores at ``out``. Raises UserError if they were not made by
    the same request."""
    try:
        record = json.loads((out / RECORD).read_bytes())
        made_by, kept = record["request"], record["summary"]
        # Versions before kept some of it under other names.
        known = {f.name: kept[f.name] for f in fields(Summary) if f.name in kept}
        found = Summary(**{**known, "what": what, "out": str(out), "reused": True})
        different = [name for name, value in request.items() if made_by.get(name) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{out} exists and is not a store made by prepare; remove it first") from e
    if different:
        raise UserError(
            f"{out} was prepared with other arguments ({', '.join(different)} differ); {mend}"
        )
    for split in _splits(request):
        info = Store.open(out / split, samples=what == "samples").info
        found.entries[split], found.tokens[split] = info.documents, info.tokens
    return found


@contextmanager
def making(
    out: Path, request: dict[str, Any], tokenizer: TextTokenizer, summary: Summary
) -> Iterator[dict[str, StoreWriter]]:
    """Writers for the stores of all splits, which appear at ``out`` together with the tokenizer and
    the record of their making, unless something fails. Raises UserError, also for an empty split.
    """
    if opening := tokenizer.decode(tokenizer.opening.tolist()):
        print(f"every text begins with {opening}, as the tokenizer has it", file=sys.stderr)
    with whole_directory(out) as partial, ExitStack() as opened:
        writers = {
            split: StoreWriter(
                partial / split,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
                tokenizer_sha256=tokenizer.sha256,
            )
            for split in _splits(request)
        }
        for writer in writers.values():
            opened.enter_context(closing(writer))
        yield writers
        summary.entries = {split: writer.documents for split, writer in writers.items()}
        summary.tokens = {split: writer.tokens for split, writer in writers.items()}
        summary.check_splits(request["heldout"])
        for writer in writers.values():
            writer.finish(summary.sources)
        for name, content in tokenizer.files.items():
            write_file(partial / name, [content])
        record = {"request": request, "summary": asdict(summary)}
        write_file(partial / RECORD, [json.dumps(record, indent=2).encode()])


def _splits(request: dict[str, Any]) -> tuple[str, ...]:
    return (TRAIN, HELDOUT) if request["heldout"] or request.get("heldout data") else (TRAIN,)
