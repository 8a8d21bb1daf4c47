"""Mixture-of-experts operations in plain PyTorch: the specification.

Shapes: T tokens, D hidden, E experts, K experts per token, R routed slots (T*K), L width in which
experts work, F expert inner width.

Everything is computed in fp32 (float64 for float64 inputs) and rounded where it is stored. On CPUs
without matrix units for bf16 that is also the faster way. The experts work one after the other,
each on rows that fit a CPU's second-level cache, so that the passes between the matrix products
do not go to memory. On a GPU the loop waits for the group sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_kernels.moe.function import Experts, Gradients, Routed, Slots, Wanted

_FEW = 1 << 17  # numbers of all experts together that stay in a CPU's second-level cache


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


def combine_slots(y_RL: Tensor, inverse_TK: Tensor) -> Tensor:
    acc, y_RL = accumulation_dtype(y_RL), y_RL.index_select(0, inverse_TK.flatten())
    return y_RL.unflatten(0, inverse_TK.shape).sum(1, dtype=acc).to(y_RL.dtype)


class LoopExperts(Experts):
    """The expert MLP, expert by expert."""

    def groups(self, counts_E: Tensor, n_rows: int) -> list[int]:
        return counts_E.tolist()

    def forward(self, routed: Routed, keep: bool) -> tuple[Tensor, Tensor]:
        x_RL, acc = routed.rows(routed.x_TL), accumulation_dtype(routed.x_TL)
        h_RF = x_RL.new_empty(x_RL.shape[0], routed.w_up_EFL.shape[1])
        if not keep and _may_be_at_once(x_RL, routed.w_up_EFL):
            return _at_once(x_RL, routed), h_RF
        y_RL, up_EFL, down_ELF = torch.empty_like(x_RL, dtype=acc), routed.up_EFL, routed.down_ELF
        for e, rows in _occupied(routed.groups):
            _pre_activation(x_RL[rows], up_EFL[e], h_RF[rows])
            act = h_RF[rows].to(acc).relu()
            act.mul_(act).mul_(routed.weight_R[rows, None])
            torch.mm(act, down_ELF[e].to(acc).t(), out=y_RL[rows])
        return y_RL, h_RF

    def pre_activation(self, routed: Routed) -> Tensor:
        x_RL = routed.rows(routed.x_TL)
        h_RF = x_RL.new_empty(x_RL.shape[0], routed.w_up_EFL.shape[1])
        for (x, h), up in zip(_split(routed, x_RL, h_RF), routed.up_EFL, strict=True):
            _pre_activation(x, up, h)
        return h_RF

    def backward(self, routed: Routed, h_RF: Tensor, dy_TL: Tensor, wanted: Wanted) -> Gradients:
        x_RL, acc = routed.rows(routed.x_TL), accumulation_dtype(routed.x_TL)
        matrices, weight_R = (routed.up_EFL, routed.down_ELF), routed.weight_R
        dx_RL, dweight_R = (torch.empty_like(t, dtype=acc) for t in (x_RL, weight_R))
        dup_EFL, ddown_ELF = (
            torch.empty_like(w, dtype=acc) if want else None
            for w, want in zip(matrices, wanted, strict=True)
        )
        ones_F = h_RF.new_ones(h_RF.shape[1], dtype=acc)
        rows = _split(routed, routed.rows(dy_TL), h_RF, x_RL, weight_R, dx_RL, dweight_R)
        experts = zip(rows, *matrices, strict=True)
        for e, ((dy, h, x, weight, dx, dweight), up, down) in enumerate(experts):
            dy, relu, weight = dy.to(acc), h.to(acc).relu(), weight[:, None]
            dh = torch.mm(dy, down.to(acc)).mul_(relu)
            torch.mv(dh * relu, ones_F, out=dweight)  # sum over F; sum() is several times slower
            if ddown_ELF is not None:
                torch.mm(dy.t(), relu.mul_(relu).mul_(weight), out=ddown_ELF[e])
            dh.mul_(2 * weight)
            torch.mm(dh, up.to(acc), out=dx)
            if dup_EFL is not None:
                torch.mm(dh.t(), x.to(acc), out=dup_EFL[e])
        return dx_RL, dweight_R, dup_EFL, ddown_ELF

    def rows(self, a_RM: Tensor, b_EMN: Tensor, groups: list[int]) -> Tensor:
        acc, y_RN = accumulation_dtype(a_RM), a_RM.new_empty(len(a_RM), b_EMN.shape[2])
        for e, rows in _occupied(groups):
            y_RN[rows] = torch.mm(a_RM[rows].to(acc), b_EMN[e].to(acc))
        return y_RN

    def sums(self, a_RM: Tensor, b_RN: Tensor, groups: list[int], dtype: torch.dtype) -> Tensor:
        acc = accumulation_dtype(a_RM)
        y_EMN = a_RM.new_zeros(len(groups), a_RM.shape[1], b_RN.shape[1], dtype=dtype)
        for e, rows in _occupied(groups):
            y_EMN[e] = torch.mm(a_RM[rows].to(acc).t(), b_RN[rows].to(acc))
        return y_EMN


def _may_be_at_once(x_RL: Tensor, w_up_EFL: Tensor) -> bool:
    """Few rows, of what grouped_mm takes: fp32, and strides of whole vectors."""
    rows, aligned = len(x_RL), not any(width % 4 for width in w_up_EFL.shape[1:])
    fp32 = x_RL.dtype == w_up_EFL.dtype == torch.float32
    return x_RL.is_cpu and fp32 and aligned and 0 < rows * w_up_EFL.shape[1] <= _FEW


def _at_once(x_RL: Tensor, routed: Routed) -> Tensor:
    """The output, by one operation for all experts: with few rows each takes longer than what it
    does."""
    ends_E = torch.tensor(routed.groups, dtype=torch.int32, device=x_RL.device)
    ends_E = ends_E.cumsum(0, dtype=torch.int32)
    act_RF = F.grouped_mm(x_RL, routed.w_up_EFL.mT, offs=ends_E).relu_()
    act_RF.mul_(act_RF).mul_(routed.weight_R[:, None])
    return F.grouped_mm(act_RF, routed.w_down_ELF.mT, offs=ends_E)


def _occupied(groups: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which: when one token is generated most have none."""
    start = 0
    for e, count in enumerate(groups):
        if count:
            yield e, slice(start, start + count)
        start += count


def _split(routed: Routed, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each expert's rows of tensors."""
    return zip(*(t.split(routed.groups) for t in tensors), strict=True)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The type in which results for x are computed: fp32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pre_activation(x: Tensor, up: Tensor, h: Tensor) -> None:
    acc = accumulation_dtype(x)
    if h.dtype == acc:
        torch.mm(x, up.t(), out=h)
    else:
        h.copy_(torch.mm(x.to(acc), up.to(acc).t()))


def experts_for(x: Tensor, n_rows: int, n_experts: int, *widths: int) -> Experts:
    """What calculates rows of x by experts with these widths."""
    return LoopExperts()
