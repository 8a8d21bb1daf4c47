"""Router, sorting of routed slots, and combination of their results, in plain PyTorch.

Shapes: T tokens, D hidden, E experts, K experts per token, R routed slots (T*K), L expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Slots(NamedTuple):
    """Routed slots sorted by expert. Slot ``t*K + k`` is the k-th choice of token t."""

    order_R: Tensor
    """int64: the slot at each sorted place; its token is ``order_R // K``."""
    inverse_R: Tensor
    """int64: the sorted place of each slot."""
    counts_E: Tensor
    """int64: slots per expert."""


def topk_router(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, k: int, scaling_factor: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(x_TD)
    scores_TE = torch.mm(x_TD.to(acc), weight_ED.to(acc).t()).sigmoid()
    topk_ids_TK = (scores_TE.detach() + bias_E).topk(k, dim=-1, sorted=False).indices
    topk_weights_TK = scores_TE.gather(1, topk_ids_TK)
    if normalize:
        topk_weights_TK = topk_weights_TK / (topk_weights_TK.sum(-1, keepdim=True) + 1e-20)
    return topk_ids_TK, topk_weights_TK * scaling_factor, scores_TE


def sort_slots(topk_ids_TK: Tensor, n_experts: int) -> Slots:
    ids_R = topk_ids_TK.reshape(-1)
    device = ids_R.device
    sorted_R, order_R = ids_R.sort(stable=True)
    places_R = torch.arange(ids_R.numel(), device=device)
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, places_R)
    # Boundaries by binary search rather than bincount, which waits for a GPU.
    bounds = torch.searchsorted(sorted_R, torch.arange(n_experts + 1, device=device))
    return Slots(order_R, inverse_R, bounds.diff())


def combine(y_RL: Tensor, inverse_R: Tensor, n_tokens: int) -> Tensor:
    """Sum of each token's K slots, in a fixed order, accumulated in fp32: [T, L]."""
    if not n_tokens:
        return y_RL.new_zeros(0, y_RL.shape[1])
    return F.embedding_bag(inverse_R.view(n_tokens, -1), y_RL, mode="sum")


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The type in which results for x are computed: fp32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
