"""Distillation: KL divergence from a teacher over the same tokens, in place of cross-entropy or of
a share of it.

Shapes: T tokens, C tokens of one chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.objectives.next_token import NextToken, Targets

_CHUNK_BYTES = 64 << 20  # of one model's logits


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
        loss, sums = self._cross_entropy(hidden, targets, targets.scale_N * share_N)
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


def linear_kl(
    h_TD: Tensor, head_VD: Tensor, teacher_TD: Tensor, teacher_VD: Tensor, weights_T: Tensor
) -> Tensor:
    """Sum over tokens of weight * KL(teacher || student), fp32 scalar, of the softmax of
    h head^T; gradients for h_TD and head_VD.

    Logits are fp32; those of a chunk of tokens are there at a time, once more in the backward
    pass. The head's gradient is summed in fp32.
    """
    chunk = max(1, _CHUNK_BYTES // (4 * len(head_VD)))
    heads = head_VD.float(), teacher_VD.detach().float()
    total = torch.zeros((), device=h_TD.device)
    rows = zip(*(t.split(chunk) for t in (h_TD, teacher_TD, weights_T)), strict=True)
    for part in rows:
        total = total + checkpoint(
            _chunk_kl, *part, *heads, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _chunk_kl(
    h_CD: Tensor, teacher_CD: Tensor, weights_C: Tensor, head_VD: Tensor, teacher_VD: Tensor
) -> Tensor:
    q_CV, p_CV = (
        F.linear(h.float(), head).log_softmax(-1)
        for h, head in ((h_CD, head_VD), (teacher_CD, teacher_VD))
    )
    return F.kl_div(q_CV, p_CV, log_target=True, reduction="none").sum(-1) @ weights_C
