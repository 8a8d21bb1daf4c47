"""The objective of pre-training and fine-tuning over one Batch.

loss = CE + (lambda / D) * sum_k CE_k + mu * aux, where every cross-entropy is a sum over the whole
global batch divided by the global count of its own valid targets, and aux, the sequence-wise
balance loss, is the mean over the rows of the global batch. Fine-tuning may take the mean over
documents (conversations) of each one's own mean instead; each depth then counts the documents, and
the targets of each, that it has itself. In distillation, the KL divergence from a teacher over the
same tokens, counted in the same way, takes the place of CE or of a share of it.

Shapes: B rows, S sequence, T = B*S tokens, D depths of multi-token prediction, N = 1 + D losses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.mtp import shift_left
from nemo_hybrid.train.distill import linear_kl
from nemo_kernels.loss import linear_cross_entropy


class Normalizer(NamedTuple):
    """Counts over all ranks and micro-batches of one optimizer step."""

    targets_N: Tensor  # int64: valid targets (or documents) of the main loss and of each depth
    rows: int  # rows of the global batch
    per_document: bool = False  # every document's mean counts alike, not every target


class LossParts(NamedTuple):
    """One micro-batch on one rank; sums, so that shares add up."""

    loss: Tensor  # fp32 scalar with gradient: this micro-batch's share of the global loss
    # fp32, detached: summed cross-entropies (or documents' means), main first. In distillation the
    # first is that of what is learnt: with its share of KL.
    ce_sums_N: Tensor
    aux_sum: Tensor  # fp32, detached: balance loss summed over rows and layers
    counts: dict[str, Tensor]  # layer name -> routed slots per expert


def targets(batch: Batch, depths: int) -> tuple[Tensor, Tensor]:
    """Labels and validity [1 + D, B, S]: depth k at position t targets token t + 1 + k.

    A target counts only if it lies in position t's own document and was not masked itself.
    """
    labels, valid = [batch.labels_BS], [batch.loss_mask_BS]
    for k in range(1, depths + 1):
        labels.append(shift_left(batch.labels_BS, k, batch.seq_idx_BS))
        valid.append(shift_left(batch.loss_mask_BS, k, batch.seq_idx_BS))
    return torch.stack(labels), torch.stack(valid)


def count_targets(batch: Batch, depths: int, per_document: bool = False) -> Tensor:
    """Valid targets of the main loss and of each depth, or documents with such: int64 [1 + D]."""
    valid_NBS = targets(batch, depths)[1]
    if per_document:
        return (_of_documents(batch, valid_NBS)[0] > 0).sum(1)
    return valid_NBS.flatten(1).sum(1)


def _of_documents(batch: Batch, valid_NBS: Tensor) -> tuple[Tensor, Tensor]:
    """Valid targets of each document [N, documents], and the document of each token [T]."""
    lengths = batch.cu_seqlens.diff().long()
    numbers = torch.arange(len(lengths), device=lengths.device)
    tokens = valid_NBS[0].numel()
    document_T = numbers.repeat_interleave(lengths, output_size=tokens)
    counts = valid_NBS.new_zeros(len(valid_NBS), len(lengths), dtype=torch.int64)
    return counts.index_add_(1, document_T, valid_NBS.flatten(1).long()), document_T


def _weights(batch: Batch, valid_NBS: Tensor, per_document: bool) -> Tensor:
    """fp32 [N, T]: what each target's cross-entropy counts, before the global count divides it."""
    valid_NT = valid_NBS.flatten(1).float()
    if not per_document:
        return valid_NT
    counts, document_T = _of_documents(batch, valid_NBS)
    return valid_NT / counts.clamp(min=1)[:, document_T]


class PretrainObjective(nn.Module):
    """What the engine runs forward and backward."""

    def __init__(
        self,
        model: HybridLM,
        train: TrainOptions,
        teacher: HybridLM | None = None,
        kl_weight: float = 0.0,
    ) -> None:
        """``kl_weight``: share of KL(teacher || model) in the main loss, beside cross-entropy."""
        super().__init__()
        self.model = model
        self.teacher = (teacher, kl_weight)  # in a tuple: its parameters are not the engine's
        # Without a weight the MTP block is not run at all: fine-tuning leaves it as it is.
        self.depths = model.config.mtp_num_depths if train.mtp_loss_weight else 0
        self.weights_N = [1.0] + [train.mtp_loss_weight / max(1, self.depths)] * self.depths
        self.aux_weight = train.aux_loss_weight

    def forward(self, batch: Batch, normalizer: Normalizer) -> LossParts:
        model = self.model
        h_BSD, stats = model.forward_hidden(batch.ids_BS, batch.packing)
        hidden = [h_BSD]
        if self.depths:
            mtp_hidden, mtp_stats = model.forward_mtp(h_BSD, batch.ids_BS, batch.packing)
            hidden += mtp_hidden
            stats = stats | mtp_stats

        labels_NBS, valid_NBS = targets(batch, self.depths)
        weights_N = torch.tensor(self.weights_N, device=h_BSD.device)
        # max(1): a loss without any target in the global batch is zero, not 0/0.
        scale_N = weights_N / normalizer.targets_N.clamp(min=1)
        weights_NT = _weights(batch, valid_NBS, normalizer.per_document)
        teacher, kl_weight = self.teacher
        learn_kl = teacher is not None and torch.is_grad_enabled()
        share_N = torch.ones_like(scale_N)
        if learn_kl:
            share_N[0] -= kl_weight
        # One call for all losses: the head's gradient is summed in fp32 before its one rounding.
        loss, ce_NT = linear_cross_entropy(
            torch.stack(hidden).flatten(0, 2),
            model.lm_head.weight,
            labels_NBS.flatten(),
            ((scale_N * share_N)[:, None] * weights_NT).flatten(),
        )
        sums_N = share_N * (ce_NT.view(len(hidden), -1) * weights_NT).sum(1)
        if teacher is not None and learn_kl:
            with torch.no_grad():
                teacher_BSD, _ = teacher.forward_hidden(batch.ids_BS, batch.packing)
            kl_sum = linear_kl(
                h_BSD.flatten(0, 1),
                model.lm_head.weight,
                teacher_BSD.flatten(0, 1),
                teacher.lm_head.weight,
                weights_NT[0],
            )
            loss = loss + kl_sum * (scale_N[0] * kl_weight)
            sums_N[0] += kl_weight * kl_sum.detach()
        aux_sum = torch.zeros((), device=h_BSD.device)
        for routed in stats.values():
            aux_sum = aux_sum + routed.aux_loss
        if self.aux_weight:
            loss = loss + aux_sum * (self.aux_weight / normalizer.rows)
        return LossParts(
            loss,
            sums_N,
            aux_sum.detach(),
            {name: routed.counts_E for name, routed in stats.items()},
        )
