"""Distillation: KL divergence from a teacher over the same tokens, in place of cross-entropy or of
a share of it.

Shapes: T tokens, C tokens of one chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.objectives.next_token import NextToken, Targets
from nemo_kernels.loss import linear_kl


class Distilled(NextToken):
    """(1 - weight) * CE + weight * KL(teacher || model) in the place of CE, counted alike.

    Further parts: ``kl``, and ``distilled``, the mixture, which is the loss that is shown.
    """

    def __init__(
        self,
        model: HybridLM,
        train: TrainOptions,
        per_document: Callable[[int], bool],
        teacher: HybridLM,
        weight: float,
    ) -> None:
        """``weight``: share of the divergence in the main loss."""
        super().__init__(model, train, per_document)
        self._teacher = (teacher,)  # in a tuple: its parameters are not the engine's
        self.kl_weight = weight

    def _learn(
        self, batch: Batch, hidden: list[Tensor], targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (teacher,) = self._teacher
        share_N = torch.ones_like(targets.scale_N)
        share_N[0] -= self.kl_weight
        loss, ce_NT = self._cross_entropy(hidden, targets, targets.scale_N * share_N)
        sums = self._sums(ce_NT, targets)
        with torch.no_grad():
            teacher_BSD, _ = teacher.forward_hidden(batch.ids_BS, batch.packing)
        kl_sum = linear_kl(
            hidden[0].flatten(0, 1),
            self.model.lm_head.weight,
            teacher_BSD.flatten(0, 1),
            teacher.lm_head.weight,
            targets.weights_NT[0],
        )
        loss = loss + kl_sum * (targets.scale_N[0] * self.kl_weight)
        sums["kl"] = kl_sum.detach()
        sums["distilled"] = share_N[0] * sums["ce"] + self.kl_weight * sums["kl"]
        return loss, sums

    def means(self, sums: Mapping[str, Tensor], normalizer: Normalizer) -> dict[str, float]:
        count = normalizer.counts_N[0].clamp(min=1)
        further = {"loss": sums["distilled"] / count, "kl": sums["kl"] / count}
        return {**super().means(sums, normalizer), **{k: float(v) for k, v in further.items()}}
