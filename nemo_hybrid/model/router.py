"""Router of a MoE layer: sigmoid scores, selection by score plus a balancing bias.

The bias (Wang et al. 2024, arXiv 2408.15664) steers the choice only; it is moved once per global
batch by the training loop, never by a gradient.

Shapes: B rows, S sequence, T = B*S tokens, D hidden, E experts, K experts per token, L layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.fp32 import KeepsFp32
from nemo_kernels.moe import topk_router


class RoutingStats(NamedTuple):
    """What balancing needs from one layer and one forward pass: sums over a row's tokens, so that
    those of its parts add up."""

    counts_BE: Tensor  # int64: routed slots per expert
    shares_BE: Tensor  # fp32, with gradient: scores, normalised over all experts


class Router(KeepsFp32):
    """Scores in fp32 whatever the model's dtype; ``e_score_correction_bias`` is kept in fp32."""

    e_score_correction_bias: Tensor

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.top_k = cfg.num_experts_per_tok
        self.scaling = cfg.routed_scaling_factor
        self.normalize = cfg.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))
        bias_E = torch.zeros(cfg.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(
        self, x_TD: Tensor, given_TK: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Expert ids [T, K], weights [T, K] (fp32) and sigmoid scores [T, E] (fp32). Tokens go to
        the experts that are given, where these are no less than 0, with weights of their scores
        (router replay, arXiv 2510.11370)."""
        ids_TK, weights_TK, scores_TE = topk_router(
            x_TD,
            self.weight,
            self.e_score_correction_bias,
            self.top_k,
            self.scaling,
            self.normalize,
        )
        if given_TK is not None:
            ids_TK = torch.where(given_TK < 0, ids_TK, given_TK)
            weights_TK = scores_TE.gather(1, ids_TK)
            if self.normalize:
                weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
            weights_TK = weights_TK * self.scaling
        return ids_TK, weights_TK, scores_TE


def routing_stats(
    scores_TE: Tensor, topk_ids_TK: Tensor, rows: int, real_BS: Tensor | None = None
) -> RoutingStats:
    """Of every row's tokens. ``real_BS``: bool, False for padding, which all goes to the same few
    experts and does not count."""
    experts, top_k = scores_TE.shape[1], topk_ids_TK.shape[1]
    ids_BR = topk_ids_TK.view(rows, -1)
    row_B1 = torch.arange(rows, device=ids_BR.device)[:, None]
    share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    share_BSE = share_TE.view(rows, -1, experts)
    if real_BS is None:
        one_R = torch.ones_like(ids_BR).flatten()
    else:
        one_R = real_BS.flatten().repeat_interleave(top_k).long()
        share_BSE = share_BSE * real_BS[..., None]
    # Not by bincount, which waits for a GPU.
    place_R = (ids_BR + row_B1 * experts).flatten()
    counts_BE = ids_BR.new_zeros(rows * experts).scatter_add_(0, place_R, one_R)
    return RoutingStats(counts_BE.view(rows, experts), share_BSE.sum(1))


def balance_loss(
    shares_LBE: Tensor, counts_LBE: Tensor, tokens_B1: Tensor | int, top_k: int
) -> Tensor:
    """Of each of L layers the sum over rows of E * sum_i f_i * P_i.

    f_i is the share of a row's routed slots that expert i received, P_i the row's mean of the
    scores normalised over all experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    ``counts_LBE`` and ``tokens_B1`` are of whole rows; ``shares_LBE`` may be of parts, whose shares
    of the loss these are then.
    """
    scale = counts_LBE.shape[-1] / top_k
    return scale * (counts_LBE * (shares_LBE / tokens_B1) / tokens_B1).sum((-2, -1))
