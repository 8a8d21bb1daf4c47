"""Steps on long and on short rows, between which a run alternates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nemo_hybrid.config.batches import BatchSizes
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import BLOCK, ByNumber, Share, Stored


class Alternating(ByNumber):
    """The rows of ``long``, and in a share of the steps those of ``short``, as many tokens per
    micro-batch: which, depends on the step's number alone. Each numbers its samples for itself.
    Of processes that divide long rows each has whole short ones.
    """

    def __init__(self, long: Stored, short: Stored, share: float) -> None:
        """``share``: of the steps, to one part in `BLOCK`."""
        self.long, self.short = long, short
        self.quota = round(share * BLOCK)
        self.times = long.sequence_length // short.sequence_length
        self._last = long

    def step(self, number: int, share: Share) -> list[Batch]:
        # Spread evenly, so that a phase of a few steps has its share, too.
        before, after = (n * self.quota // BLOCK for n in (number, number + 1))
        self._last = self.short if after > before else self.long
        if self._last is self.long:
            return self.long.step(number - before, share)
        share = share._replace(
            rank=share.rank * share.cp + share.part,
            world_size=share.world_size * share.cp,
            sizes=BatchSizes(share.sizes.full * self.times),
            micro_batch_size=share.micro_batch_size * self.times // share.cp,
            cp=1,
            part=0,
        )
        return [replace(b, in_one=self.times) for b in self.short.step(before, share)]

    def heldout(self, share: Share) -> Iterator[Batch]:
        return self.long.heldout(share)

    def metrics(self) -> dict[str, float]:
        return {"sequence_length": self._last.sequence_length}
