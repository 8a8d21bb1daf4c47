"""Next-token prediction, at every depth, over one Batch.

loss = CE + (lambda / D) * sum_k CE_k + mu * aux, where every cross-entropy is a sum over the whole
global batch divided by the global count of its own valid targets, and aux, the sequence-wise
balance loss, is the mean over the rows of the global batch. Fine-tuning may take the mean over
documents (conversations) of each one's own mean instead; each depth then counts the documents, and
the targets of each, that it has itself. A batch may say how often each next token counts: so a
policy gradient is a cross-entropy too (see `policy`).

Shapes: B rows, S sequence, T = B*S tokens, D depths of multi-token prediction, N = 1 + D losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.data.batch import Ahead, Batch
from nemo_hybrid.model.hybrid import HybridLM, Stats, tokens_ahead
from nemo_hybrid.model.mtp import shift_left
from nemo_hybrid.model.router import balance_loss
from nemo_hybrid.objectives.base import LossParts, Normalizer, Objective
from nemo_kernels.loss import linear_cross_entropy


class Targets(NamedTuple):
    """What a batch's hidden states learn, and how much of it counts."""

    labels_NBS: Tensor  # int64
    weights_NT: Tensor  # fp32: what each cross-entropy counts, before the global count divides it
    scale_N: Tensor  # fp32: weight of each loss over its global count


class NextToken(Objective):
    """Cross-entropy of the next token and of each depth's, and the balance of the experts.

    Its parts: ``ce``, ``mtp_1`` ... ``mtp_D``, and ``aux``, before their weights.
    """

    detached = False
    """Whether depths have no part in the gradients of the backbone."""

    def __init__(
        self,
        model: HybridLM,
        train: TrainOptions,
        per_document: Callable[[int], bool] = lambda step: False,
        depths: int | None = None,
    ) -> None:
        """``per_document``: whether the step after so many averages documents' means instead of
        all targets. ``depths`` of multi-token prediction; None: as many as the model has."""
        super().__init__()
        self.model = model
        # Without a weight the MTP block is not run at all: fine-tuning leaves it as it is.
        self.depths = (depths or model.config.mtp_num_depths) if train.mtp_loss_weight else 0
        self.names = ["ce", *(f"mtp_{k}" for k in range(1, self.depths + 1))]
        self.depth_weight = train.mtp_loss_weight / max(1, self.depths)
        self.aux_weight = train.aux_loss_weight
        self.per_document = per_document

    def count(self, batch: Batch, step: int) -> Tensor:
        return count_targets(batch, self.depths, self.per_document(step))

    def cut(self, batch: Batch, part: int, parts: int, step: int) -> Batch:
        labels_NBS, weights_NT = self._learnt(batch, step)
        ids_DBS = tokens_ahead(batch.ids_BS, self.depths, batch.documents)
        ahead = Ahead(ids_DBS, labels_NBS, weights_NT.view(labels_NBS.shape))
        return batch.cut(part, parts, self.model.config.conv_kernel - 1, ahead)

    def forward(self, batch: Batch, normalizer: Normalizer) -> LossParts:
        hidden, stats = self._read(batch, normalizer.step)
        targets = self._targets(batch, normalizer)
        loss, sums = self._learn(batch, hidden, targets)
        aux_sum = self._balance(batch, stats, loss.device)
        if self.aux_weight:
            loss = loss + aux_sum * (self.aux_weight / normalizer.rows)
        sums["aux"] = aux_sum.detach()
        loads = {
            name: torch.cat([r.counts_BE for r in routed]).sum(0) for name, routed in stats.items()
        }
        return LossParts(loss, sums, loads)

    def per_target(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropies in nats, fp32 [N, T], and how often each counts."""
        hidden, _ = self._read(batch, step=0)
        unit_N = torch.ones(len(self.names), dtype=torch.int64, device=hidden[0].device)
        targets = self._targets(batch, Normalizer(unit_N, rows=1))
        return self._cross_entropy(hidden, targets, targets.scale_N)[1], targets.weights_NT

    def means(self, sums: Mapping[str, Tensor], normalizer: Normalizer) -> dict[str, float]:
        counts_N = normalizer.counts_N.clamp(min=1)
        means = {name: float(sums[name] / counts_N[i]) for i, name in enumerate(self.names)}
        means["aux"] = float(sums["aux"]) / (normalizer.rows * max(1, self._moe_layers()))
        return {"loss": means["ce"], **means}

    def _read(self, batch: Batch, step: int) -> tuple[list[Tensor], Stats]:
        """Hidden states [B, S, D] of the N losses, and routing statistics."""
        h_BSD, stats = self.model.forward_hidden(batch.ids_BS, batch.packing, batch.experts_BSLK)
        if not self.depths:
            return [h_BSD], stats
        ahead_DBS = None if batch.ahead is None else batch.ahead.ids_DBS
        mtp_hidden, mtp_stats = self.model.forward_mtp(
            h_BSD, batch.ids_BS, batch.packing, ahead_DBS=ahead_DBS, detached=self.detached
        )
        return [h_BSD, *mtp_hidden], stats | mtp_stats

    def _targets(self, batch: Batch, normalizer: Normalizer) -> Targets:
        if batch.ahead is None:
            labels_NBS, weights_NT = self._learnt(batch, normalizer.step)
        else:
            labels_NBS, weights_NT = batch.ahead.labels_NBS, batch.ahead.weights_NBS.flatten(1)
        # Made where they are needed: a copy from the host would wait for the device.
        weights_N = torch.full((len(self.names),), self.depth_weight, device=labels_NBS.device)
        weights_N[:1].fill_(1.0)
        # max(1): a loss without any target in the global batch is zero, not 0/0.
        scale_N = weights_N / normalizer.counts_N.clamp(min=1)
        return Targets(labels_NBS, weights_NT, scale_N)

    def _learnt(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Labels int64 [N, B, S] of whole rows, and how much of each counts, fp32 [N, T]."""
        labels_NBS, valid_NBS = labels_and_validity(batch, self.depths)
        weights_NT = _weights(batch, valid_NBS, self.per_document(step))
        if batch.weight_BS is not None:
            weights_NT[0] *= batch.weight_BS.flatten()
        return labels_NBS, weights_NT

    def _balance(self, batch: Batch, stats: Stats, device: torch.device) -> Tensor:
        """This process's share of the balance loss, summed over rows and layers."""
        aux_sum = torch.zeros((), device=device)
        if not stats:
            return aux_sum
        # Of all layers at once, the depths of one after the other.
        routed = [one for passes in stats.values() for one in passes]
        counts_LBE, shares_LBE = (torch.stack(sums) for sums in zip(*routed, strict=True))
        tokens_B1: Tensor | int = batch.ids_BS.shape[1]
        if batch.shard is not None:
            tokens_B1 = sum(batch.shard.sizes)
            counts_LBE = self.model.sequence.sum(counts_LBE)
        if batch.documents.packing and batch.documents.real_BS is not None:
            tokens_B1 = batch.documents.real_BS.sum(1, keepdim=True).clamp(min=1)
        top_k = self.model.config.num_experts_per_tok
        losses = iter(balance_loss(shares_LBE, counts_LBE, tokens_B1, top_k))
        for passes in stats.values():
            aux_sum = aux_sum + reduce(torch.add, islice(losses, len(passes)))
        return aux_sum

    def _learn(
        self, batch: Batch, hidden: list[Tensor], targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of the loss but for the balance, and the sums of its parts."""
        loss, ce_NT = self._cross_entropy(hidden, targets, targets.scale_N)
        return loss, self._sums(ce_NT, targets)

    def _cross_entropy(
        self, hidden: list[Tensor], targets: Targets, scale_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of all cross-entropies, and each of them, [N, T]."""
        # One call for all losses: the head's gradient is summed in fp32 before its one rounding.
        loss, ce_R = linear_cross_entropy(
            torch.stack(hidden).flatten(0, 2),
            self.model.lm_head.weight,
            targets.labels_NBS.flatten(),
            (scale_N[:, None] * targets.weights_NT).flatten(),
        )
        return loss, ce_R.view(len(hidden), -1)

    def _sums(self, ce_NT: Tensor, targets: Targets) -> dict[str, Tensor]:
        return dict(zip(self.names, (ce_NT * targets.weights_NT).sum(1), strict=True))

    def _moe_layers(self) -> int:
        config = self.model.config
        mtp = config.mtp_pattern if self.depths else ""
        return (config.pattern + mtp).count("E")


class DetachedMTP(NextToken):
    """Here multi-token prediction trains its block alone: its losses have no part in the gradients
    of what that shares with the backbone."""

    detached = True

    def _cross_entropy(
        self, hidden: list[Tensor], targets: Targets, scale_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        head_VD = self.model.lm_head.weight
        heads = [head_VD, *[head_VD.detach()] * self.depths]
        scale_NT = scale_N[:, None] * targets.weights_NT
        found = [
            linear_cross_entropy(h_BSD.flatten(0, 1), head, labels_BS.flatten(), scale_T)
            for h_BSD, head, labels_BS, scale_T in zip(
                hidden, heads, targets.labels_NBS, scale_NT, strict=True
            )
        ]
        return torch.stack([loss for loss, _ in found]).sum(), torch.stack([ce for _, ce in found])


def labels_and_validity(batch: Batch, depths: int) -> tuple[Tensor, Tensor]:
    """Labels and validity [1 + D, B, S]: depth k at position t targets token t + 1 + k.

    A target counts only if it lies in position t's own document and was not masked itself.
    """
    labels, valid = [batch.labels_BS], [batch.loss_mask_BS]
    for k in range(1, depths + 1):
        labels.append(shift_left(batch.labels_BS, k, batch.documents.seq_idx_BS))
        valid.append(shift_left(batch.loss_mask_BS, k, batch.documents.seq_idx_BS))
    return torch.stack(labels), torch.stack(valid)


def count_targets(batch: Batch, depths: int, per_document: bool = False) -> Tensor:
    """Valid targets of the main loss and of each depth, or documents with such: int64 [1 + D]."""
    valid_NBS = labels_and_validity(batch, depths)[1]
    if per_document:
        return (_of_documents(batch, valid_NBS)[0] > 0).sum(1)
    return valid_NBS.flatten(1).sum(1)


def _of_documents(batch: Batch, valid_NBS: Tensor) -> tuple[Tensor, Tensor]:
    """Valid targets of each document [N, documents], and the document of each token [T]."""
    lengths = batch.documents.cu_seqlens.diff().long()
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
