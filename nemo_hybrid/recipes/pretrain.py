"""Pre-training: next tokens of documents, in windows out of token stores."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

from nemo_hybrid.checkpoint.companions import read_companions
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.data.documents import prepare
from nemo_hybrid.data.loader import Blend, open_blend
from nemo_hybrid.errors import UserError
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes.base import StoreRecipe
from nemo_hybrid.train.run import Run


class Pretrain(StoreRecipe[RunConfig, Blend]):
    """Everything is trained, from new weights or those of model.from_hf."""

    def _open_rows(self, world: World) -> Blend:
        data = self.config.data
        world.from_rank_0(self._make_default_corpus)
        with world.agreed():
            if self.origin is None:
                blend = open_blend(data, self.shape)
            else:
                ends = read_companions(self.origin).ends
                blend = open_blend(data, self.shape, ends, self.origin / "config.json")
            if self.config.train.eval_sequences and not blend.heldout:
                raise UserError(
                    "the data has no held-out part: prepare it with --heldout above 0, or set "
                    "train.eval_sequences to 0"
                )
        return blend

    def describe(self, run: Run) -> list[str]:
        """With smaller batches and phases, in steps."""
        length = self.config.data.sequence_length
        sizes = self.config.train.batch_sizes(length)
        ends = accumulate(batches for batches, _ in sizes.stages)
        return [
            *super().describe(run),
            *(
                f"up to step {end} only {size} sequences"
                for end, (_, size) in zip(ends, sizes.stages, strict=True)
            ),
            *(
                f"from step {sizes.holding(tokens, length) + 1} on data of another blend: "
                + ", ".join(f"{store} {weight:g}" for store, weight in blend.items())
                for tokens, blend in sorted(self.config.data.phases.items())
            ),
        ]

    def _make_default_corpus(self) -> None:
        path = self.config.data.path
        if path and path == self.config.data.default_corpus and not Path(path).exists():
            prepare(path, vocab_size=self.shape.vocab_size)
