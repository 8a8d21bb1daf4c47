"""Pre-training: next tokens of documents, in windows out of token stores."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from nemo_hybrid.checkpoint.companions import read_companions
from nemo_hybrid.config.run import DataOptions, RunConfig
from nemo_hybrid.data.alternating import Alternating
from nemo_hybrid.data.documents import prepare
from nemo_hybrid.data.loader import Blend, open_blend
from nemo_hybrid.errors import UserError
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes.base import StoreRecipe
from nemo_hybrid.train.run import Data, Run


class Pretrain(StoreRecipe[RunConfig, Blend]):
    """Everything is trained, from new weights or those of model.from_hf."""

    short: Blend | None = None
    """What the short rows are of."""

    def identity(self) -> dict[str, Any]:
        """With what makes the steps on short rows, if there are such."""
        options, identity = self.config.data.short, super().identity()
        if self.short is not None:
            identity["short"] = {
                "sequence_length": options.sequence_length,
                "share": options.share,
                "data": self.short.digests,
                "weights": list(self.short.weights),
            }
        return {"short": None, **identity}

    def _data(self) -> Data:
        data = self.config.data
        long = self._stored(self.rows, data.sequence_length)
        if self.short is None:
            return long
        return Alternating(
            long, self._stored(self.short, data.short.sequence_length), data.short.share
        )

    def _open_rows(self, world: World) -> Blend:
        data, short = self.config.data, self.config.data.short
        world.from_rank_0(self._make_default_corpus)
        with world.agreed():
            blend = self._open(data)
            if length := short.sequence_length:
                rows = replace(data, path=short.path, blend=short.blend, sequence_length=length)
                self.short = self._open(replace(rows, phases={}))
                if self.short.tokenizer_sha256 != blend.tokenizer_sha256:
                    raise UserError(
                        f"data.short: {self.short.tokenizer_dir} and {blend.tokenizer_dir} were "
                        "made with different tokenizers"
                    )
            if self.config.train.eval_sequences and not blend.heldout:
                raise UserError(
                    "the data has no held-out part: prepare it with --heldout above 0, or set "
                    "train.eval_sequences to 0"
                )
        return blend

    def _open(self, data: DataOptions) -> Blend:
        if self.origin is None:
            return open_blend(data, self.shape)
        ends = read_companions(self.origin).ends
        return open_blend(data, self.shape, ends, self.origin / "config.json")

    def describe(self, run: Run) -> list[str]:
        """With smaller batches, short rows, and phases, in steps."""
        length, short = self.config.data.sequence_length, self.config.data.short
        sizes = self.config.train.batch_sizes(length)
        ends = accumulate(batches for batches, _ in sizes.stages)
        return [
            *super().describe(run),
            *(
                f"up to step {end} only {size} sequences"
                for end, (_, size) in zip(ends, sizes.stages, strict=True)
            ),
            *(
                f"{short.share:.1%} of the steps on rows of {short.sequence_length} tokens out of "
                f"{blend.tokens:,}"
                for blend in filter(None, [self.short])
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
