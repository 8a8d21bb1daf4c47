"""Boosting of multi-token prediction: the block alone learns to draft what the backbone would say,
which stays as it is.

Depth k at position t drafts token t + 1 + k, for which the backbone's own prediction is made at
position t + k. Its loss is T^2 KL(backbone || depth), both at temperature T; or minus the logarithm
of the probability sum_v min(p_v, q_v) that speculation keeps the draft (LK losses, arXiv
2602.23881); or the cross-entropy of the token. Every depth may read, token by token, the state of
any depth before it that aims at the same token, as a block does that drafts after states of
which some are its own (hidden-state mixing; Megatron-LM has it for Nemotron 3 Ultra).

Shapes: B rows, S sequence, D hidden, V vocabulary, K states that one is chosen of, R = B*S rows of
the head, C of one chunk, N = 1 + depths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_hybrid.config.finetune import BoostOptions
from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.model.hybrid import HybridLM, Stats
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.objectives.next_token import NextToken, Targets
from nemo_kernels.loss import linear_kl
from nemo_kernels.lowp.rounding import random_words

_CHUNK_BYTES = 64 << 20  # of logits


class Boosted(NextToken):
    """The mean over depths of what ``options`` say. Its parts: ``mtp_1`` ... ``mtp_D``; ``loss`` is
    their mean."""

    def __init__(
        self,
        model: HybridLM,
        train: TrainOptions,
        per_document: Callable[[int], bool],
        options: BoostOptions,
    ) -> None:
        super().__init__(model, train, per_document, options.depths)
        self.options, self.seed = options, train.seed

    def means(self, sums: Mapping[str, Tensor], normalizer: Normalizer) -> dict[str, float]:
        means = super().means(sums, normalizer)
        del means["ce"]
        return {**means, "loss": sum(means[name] for name in self.names[1:]) / self.depths}

    def _read(self, batch: Batch, step: int) -> tuple[list[Tensor], Stats]:
        with torch.no_grad():
            h_BSD, _ = self.model.forward_hidden(batch.ids_BS, batch.packing)
        draws = [_stream(self.seed, step, number) for number in batch.sample_ids]
        streams_B1 = torch.tensor(draws, device=h_BSD.device)[:, None]

        def chosen(states: Sequence[Tensor]) -> Tensor:
            drawn_BS = draw(streams_B1, batch.ids_BS.shape[1], len(states))
            return mixed(states, drawn_BS, batch.documents.seq_idx_BS)

        how = chosen if self.options.mixing else itemgetter(-1)
        hidden, stats = self.model.forward_mtp(h_BSD, batch.ids_BS, batch.packing, self.depths, how)
        return [h_BSD, *hidden], stats

    def _learn(
        self, batch: Batch, hidden: list[Tensor], targets: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scale_N = targets.scale_N.clone()
        scale_N[0] = 0  # what the backbone says itself
        if self.options.loss == "ce":
            loss, ce_NT = self._cross_entropy(hidden, targets, scale_N)
            return loss, self._sums(ce_NT, targets)
        h_BSD, *depths = hidden
        loss = torch.zeros((), device=h_BSD.device)
        sums = {"ce": loss}
        for k, d_BSD in enumerate(depths, 1):
            # Where this leaves the document, nothing counts.
            backbone_RD = h_BSD.roll(-k, dims=1).flatten(0, 1)
            total = self._apart(d_BSD.flatten(0, 1), backbone_RD, targets.weights_NT[k])
            loss = loss + total * scale_N[k]
            sums[f"mtp_{k}"] = total.detach()
        return loss, sums

    def _apart(self, h_RD: Tensor, backbone_RD: Tensor, weight_R: Tensor) -> Tensor:
        """The sum over rows, each as often as its weight says."""
        head_VD = self.model.lm_head.weight
        if self.options.loss == "lk":
            return rejection(h_RD, backbone_RD, head_VD, weight_R)
        t = self.options.temperature
        return t**2 * linear_kl(h_RD / t, head_VD, backbone_RD / t, head_VD, weight_R)


def _stream(seed: int, step: int, number: int) -> int:
    """What the draws of a row come from: they depend on no layout."""
    digest = hashlib.blake2b(repr(("boost", seed, step, number)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def draw(streams_B1: Tensor, length: int, count: int) -> Tensor:
    """Numbers below ``count`` [B, S], all as probable; others for each count."""
    places_S = torch.arange(length, device=streams_B1.device) + count * length
    words_BS = random_words(places_S.expand(len(streams_B1), -1), streams_B1)
    return (words_BS >> 11).remainder(count)


def mixed(states: Sequence[Tensor], drawn_BS: Tensor, seq_idx_BS: Tensor) -> Tensor:
    """The K-th depth's input [B, S, D]: of the states [B, S, D] of the backbone and the depths
    before it, that which is drawn. All are taken from where they aim at the token of the newest, so
    that older ones stand further ahead; where that is another document, the newest is taken."""
    K, S = len(states), drawn_BS.shape[1]
    here_S = torch.arange(S, device=drawn_BS.device)
    ahead_BS = here_S + (K - 1 - drawn_BS)
    there_BS = ahead_BS.clamp(max=S - 1)
    good_BS = (ahead_BS < S) & (seq_idx_BS.gather(1, there_BS) == seq_idx_BS)
    place_BS = torch.where(good_BS, drawn_BS * S + there_BS, (K - 1) * S + here_S)
    all_BRD = torch.cat(list(states), dim=1)
    return all_BRD.gather(1, place_BS[..., None].expand(-1, -1, all_BRD.shape[2]))


def rejection(h_RD: Tensor, backbone_RD: Tensor, head_VD: Tensor, weight_R: Tensor) -> Tensor:
    """sum_r weight_r * -log sum_v min(p_rv, q_rv), of the probabilities p of the backbone and q of
    the drafts: fp32 scalar. A chunk's logits are there at a time, and once more backwards."""
    total, head_VD = torch.zeros((), device=h_RD.device), head_VD.float()
    rows_N = weight_R.nonzero()[:, 0]
    for rows_C in rows_N.split(max(1, _CHUNK_BYTES // (4 * len(head_VD)))):
        part = (h_RD[rows_C], backbone_RD[rows_C], head_VD, weight_R[rows_C])
        total = total + checkpoint(_rejected, *part, use_reentrant=False, preserve_rng_state=False)
    return total


def _rejected(h_CD: Tensor, backbone_CD: Tensor, head_VD: Tensor, weight_C: Tensor) -> Tensor:
    q_CV, p_CV = ((h.float() @ head_VD.t()).log_softmax(-1) for h in (h_CD, backbone_CD))
    return -torch.minimum(q_CV, p_CV).logsumexp(-1) @ weight_C
