"""What became of the records that samples were made of: counts, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nemo_hybrid.data.prepare import HELDOUT, TRAIN

if TYPE_CHECKING:
    from nemo_hybrid.data.samples import Made

NAMED = 5
"""Examples of every kind of unusable record."""


@dataclass
class SampleSummary:
    """What `prepare_samples` made, as prepare.json keeps it."""

    out: str
    vocab_size: int
    samples: dict[str, int]
    """Of each split; and so on."""
    tokens: dict[str, int]
    learnt: dict[str, int]
    longest: int = 0
    """Tokens of the longest sample."""
    records: dict[str, int] = field(default_factory=dict)
    """By kind."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Samples and records that cannot be learnt from, by reason."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first of them."""
    truncated: int = 0
    split_conversations: int = 0
    """Conversations that gave several samples, because their template rewrites history."""
    unread: int = 0
    """Files of other kinds in directories."""
    unread_examples: list[str] = field(default_factory=list)
    """The first of them."""
    links: int = 0
    """Symbolic links to files in directories, skipped."""
    seconds: float = 0.0
    reused: bool = False
    """True where an existing store of the same data and options was returned as it is."""

    def count(self, made: Made) -> None:
        """Count what became of a record, but for the samples themselves."""
        if made.kind:
            self.records[made.kind] = self.records.get(made.kind, 0) + 1
        self.truncated += made.truncated
        self.split_conversations += made.parts > 1 and made.kind != "pack"
        for item in made.unusable:
            self.dropped[item.kind] = self.dropped.get(item.kind, 0) + 1
            examples = self.examples.setdefault(item.kind, [])
            if len(examples) < NAMED:
                examples.append(f"{item.where}: {item.why}")

    @property
    def faults(self) -> str:
        """Everything dropped, counted by reason and named."""
        return "\n".join(
            f"  {count:,} {reason}: "
            + "; ".join(self.examples[reason])
            + (f"; and {count - NAMED:,} more" if count > NAMED else "")
            for reason, count in self.dropped.items()
        )

    def __str__(self) -> str:
        lines = [f"{self.out}: {'reused, ' if self.reused else ''}vocabulary {self.vocab_size:,}"]
        for split, name in ((TRAIN, "train   "), (HELDOUT, "held out")):
            if split in self.samples:
                what = f"tokens in {self.samples[split]:,} samples, {self.learnt[split]:,} learnt"
                lines.append(f"  {name} {self.tokens[split]:>14,} {what}")
        lines.append(f"  longest  {self.longest:>14,} tokens")
        lines += [
            f"  read     {count:>14,} records: {kind}" for kind, count in self.records.items()
        ]
        if self.split_conversations:
            what = "conversations, into several samples each"
            lines.append(f"  split    {self.split_conversations:>14,} {what}")
        if self.truncated:
            lines.append(f"  cut      {self.truncated:>14,} over-long samples")
        lines += [f"  dropped  {count:>14,} {reason}" for reason, count in self.dropped.items()]
        lines += [f"    {e}" for examples in self.examples.values() for e in examples]
        if self.unread:
            named = "; ".join(self.unread_examples)
            lines.append(f"  skipped  {self.unread:>14,} files of other kinds, such as {named}")
        if self.links:
            lines.append(f"  skipped  {self.links:>14,} symbolic links to files")
        return "\n".join(lines)
