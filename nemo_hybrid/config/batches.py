"""How many sequences each global batch has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class BatchSizes(NamedTuple):
    """Smaller batches in some stages at first, then all of one size. What a batch holds follows
    from its number alone: sequences are numbered on, whatever the sizes."""

    full: int
    """Sequences of a batch behind the stages."""
    stages: tuple[tuple[int, int], ...] = ()
    """Batches, and sequences of each."""

    @staticmethod
    def of(full: int, warmup: Mapping[float, int], sequence_length: int) -> BatchSizes:
        """``warmup``: sequences of a batch by the number of tokens up to which; a stage ends with
        the batch that reaches it."""
        stages: list[tuple[int, int]] = []
        for tokens, size in sorted(warmup.items()):
            begun = BatchSizes(size, tuple(stages))
            before = sum(batches for batches, _ in stages)
            if (batches := begun.holding(tokens, sequence_length) - before) > 0:
                stages.append((batches, size))
        return BatchSizes(full, tuple(stages))

    def sequences(self, number: int) -> range:
        """Numbers of the sequences of a batch."""
        first = 0
        for batches, size in self.stages:
            if number < batches:
                break
            number -= batches
            first += batches * size
        else:
            size = self.full
        return range(first + number * size, first + (number + 1) * size)

    def holding(self, tokens: float, sequence_length: int) -> int:
        """The least number of batches that hold so many tokens."""
        done = 0
        for batches, size in self.stages:
            if tokens <= batches * size * sequence_length:
                break
            tokens -= batches * size * sequence_length
            done += batches
        else:
            size = self.full
        return done + math.ceil(tokens / (size * sequence_length))

    def split(self, batches: int) -> list[tuple[int, int]]:
        """So many batches from the first on, as stages; empty ones are left out."""
        parts, left = [], batches
        for most, size in [*self.stages, (batches, self.full)]:
            parts.append((min(most, left), size))
            left -= parts[-1][0]
        return [part for part in parts if part[0]]
