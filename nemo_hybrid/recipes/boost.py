"""Boosting: the multi-token-prediction block alone learns to draft; see `objectives.boost`."""

from __future__ import annotations

from nemo_hybrid.checkpoint.companions import read_companions
from nemo_hybrid.data.packing import PackedSamples
from nemo_hybrid.generation.batched import Generator, Request, alone
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.objectives.base import Objective
from nemo_hybrid.objectives.boost import Boosted
from nemo_hybrid.recipes.finetune import Finetune
from nemo_hybrid.train.run import Run

_MOST_TOKENS = 256
"""Of an answer that acceptance is measured on."""
_ANSWERS = 64
"""Held-out samples whose prompts are answered, and at once on every process."""


class Boost(Finetune):
    """Evaluation also decodes held-out prompts at temperature 1, with drafts of all depths."""

    def objective(self, model: HybridLM) -> Objective:
        config = self.config
        return Boosted(model, config.train, config.train.per_document, config.boost)

    def describe(self, run: Run) -> list[str]:
        boost = self.config.boost
        return [
            *super().describe(run),
            f"boosting by {boost.loss} over {boost.depths} depths: held-out losses are "
            "cross-entropies, acceptance_length is tokens per pass at temperature 1",
        ]

    def evaluate(self, run: Run) -> dict[str, float]:
        return super().evaluate(run) | self._acceptance(run)

    def _acceptance(self, run: Run) -> dict[str, float]:
        """Tokens per pass of decoding, of all processes."""
        config, world, dispatcher = self.config, run.world, run.engine.dispatcher
        generator = Generator(
            run.model, _ANSWERS, temperature=1.0, seed=config.train.seed,
            drafts=config.boost.depths, most=dispatcher.most if dispatcher else alone,
        )  # fmt: skip
        own = self._requests(self.rows)[world.rank :: world.size]
        with world.agreed():
            passes = [tokens for r in generator.run(own) for tokens in r.passes]
        found = world.gather((sum(passes), len(passes)))
        tokens, count = (sum(of) for of in zip(*found, strict=True))
        return {"acceptance_length": tokens / count} if count else {}

    def _requests(self, rows: PackedSamples) -> list[Request]:
        """What held-out samples have before the first learnt token, to be answered."""
        assert self.origin is not None
        store = rows.heldout
        stops = frozenset(read_companions(self.origin).stops(self.shape.eos_token_id))
        if store is None:
            return []
        found = []
        for number in range(min(_ANSWERS, self.config.train.eval_sequences, len(store.lengths))):
            ids, targets = store.sample(number)
            start = max(1, int(targets.argmax()))
            found.append(Request(number, ids[:start].tolist(), _MOST_TOKENS, stops=stops))
        return found
