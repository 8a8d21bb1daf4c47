"""Mixture-of-experts: router, sorting of routed slots, grouped expert MLP, and all of it as one.

Shapes: T tokens, D hidden, E experts, K experts per token, R routed slots (T*K), L width in which
experts work (latent or hidden), F expert inner width. An expert is
``down @ (weight * relu(up @ x)^2)``: the routing weight multiplies before the down projection, so
that combining a token's K results is a plain sum.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nemo_kernels import backend
from nemo_kernels.checks import expect, expect_device, expect_range, may_read
from nemo_kernels.moe import function
from nemo_kernels.moe.function import Experts, Slots
from nemo_kernels.moe.low_rank import LowRank
from nemo_kernels.moe.low_rank import mlp as low_rank_mlp

__all__ = [
    "PATHS",
    "LowRank",
    "Slots",
    "combine_slots",
    "grouped_mlp",
    "moe_mlp",
    "sort_slots",
    "topk_router",
]

Both = tuple[LowRank | None, LowRank | None]
"""What stands beside the up and the down projection."""
PATHS = {"triton": "nemo_kernels.moe.kernel", "grouped_mm": "nemo_kernels.moe.grouped_mm"}


def topk_router(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor,
    k: int,
    scaling_factor: float,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose k experts per token by sigmoid score + bias.

    Args:
        x_TD: tokens; weight_ED: router weight; both are cast to fp32.
        bias_E: fp32 correction that moves the choice only; it receives no gradient.
        k: experts per token.
        scaling_factor: multiplies the weights.
        normalize: divide a token's k weights by their sum (+ 1e-20) first.

    Returns:
        ``topk_ids_TK`` int64 in no particular order within a token; ``topk_weights_TK`` fp32, from
        the scores without bias; ``scores_TE`` fp32 sigmoid scores. The last two are differentiable.

    Raises:
        ValueError: shapes do not fit together, or k exceeds the number of experts.
    """
    expect("x_TD", x_TD, (None, None))
    expect("weight_ED", weight_ED, (None, x_TD.shape[1]))
    expect("bias_E", bias_E, (weight_ED.shape[0],))
    expect_device(x_TD, weight_ED=weight_ED, bias_E=bias_E)
    if not 0 < k <= weight_ED.shape[0]:
        raise ValueError(f"k: expected 1 to {weight_ED.shape[0]} (experts), got {k}")
    impl = backend.implementation("moe", x_TD.device.type, x_TD.dtype, weight_ED.shape[0], k)
    return impl.topk_router(x_TD, weight_ED, bias_E, k, scaling_factor, normalize)


def sort_slots(topk_ids_TK: Tensor, n_experts: int) -> Slots:
    """Sort the R = T*K routed slots by expert, stably, without waiting for the device.

    Args:
        topk_ids_TK: int64 expert of each slot, each in [0, n_experts).
        n_experts: E.

    Returns:
        ``order_R``: slot (token*K + k) at each sorted place; ``inverse_R``: place of each slot;
        ``counts_E``: slots per expert; all int64.

    Raises:
        ValueError: ids are not a 2-D int64 tensor, or (seen on CPU tensors and in debug mode, see
            ``checks``) out of range.
    """
    expect("topk_ids_TK", topk_ids_TK, (None, None), dtype=torch.int64)
    expect_range("topk_ids_TK", "ids", topk_ids_TK, n_experts)
    impl = backend.implementation("moe", topk_ids_TK.device.type, torch.float32, n_experts)
    return impl.sort_slots(topk_ids_TK, n_experts)


def combine_slots(y_RL: Tensor, inverse_TK: Tensor) -> Tensor:
    """Sum of each token's K sorted rows, accumulated in fp32 and rounded once: y_TL; no gradients.

    Args:
        y_RL: rows in the order of :func:`sort_slots`; inverse_TK: its ``inverse_R``, by token.

    Raises:
        ValueError: shapes or devices do not fit together.
    """
    expect("y_RL", y_RL, (inverse_TK.numel(), None))
    expect("inverse_TK", inverse_TK, (None, None), dtype=torch.int64)
    expect_device(y_RL, inverse_TK=inverse_TK)
    impl = backend.implementation("moe", y_RL.device.type, y_RL.dtype, 1, inverse_TK.shape[1])
    return impl.combine_slots(y_RL.contiguous(), inverse_TK)


def grouped_mlp(
    x_RL: Tensor,
    weights_R: Tensor,
    counts_E: Tensor,
    w_up_EFL: Tensor,
    w_down_ELF: Tensor,
    recompute: bool = False,
    experts: Experts | None = None,
    low_rank: Both | None = None,
) -> Tensor:
    """Experts on rows that are already sorted by expert.

    Args:
        x_RL: rows, those of expert 0 first.
        weights_R: routing weight per row.
        counts_E: int64 rows per expert; their sum is R.
        w_up_EFL, w_down_ELF: experts' weights, in x's dtype; or in fp32: they are rounded to x's
            dtype, and their gradients are fp32 (path grouped_mm rounds those once before).
        recompute: compute the pre-activation once more in the backward pass.
        experts: calculates the expert MLP instead of the path's, for example in low precision.
        low_rank: what stands beside w_up_EFL and w_down_ELF; not together with ``experts``. The
            backward pass keeps no more for it.

    Returns:
        y_RL, with gradients for everything but counts_E; exact zeros for experts without rows.
        The backward pass keeps the inputs and, without recompute, the pre-activation [R, F].

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or (seen on CPU tensors and in
            debug mode) counts do not sum to R.
    """
    expect("x_RL", x_RL, (None, None))
    expect("weights_R", weights_R, (x_RL.shape[0],))
    _expect_experts(x_RL, w_up_EFL, w_down_ELF)
    expect("counts_E", counts_E, (w_up_EFL.shape[0],), dtype=torch.int64)
    expect_device(
        x_RL, weights_R=weights_R, counts_E=counts_E, w_up_EFL=w_up_EFL, w_down_ELF=w_down_ELF
    )
    if may_read(counts_E) and counts_E.sum() != x_RL.shape[0]:
        total = int(counts_E.sum())
        raise ValueError(f"counts_E: expected a sum of {x_RL.shape[0]} (rows), got {total}")
    if experts is None:
        experts = _by_path(x_RL, x_RL.shape[0], w_up_EFL, low_rank)[1]
    matrices = (w_up_EFL, w_down_ELF, recompute)
    return _mlp(low_rank, experts, x_RL, weights_R, None, counts_E, *matrices)


def moe_mlp(
    x_TL: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    w_up_EFL: Tensor,
    w_down_ELF: Tensor,
    recompute: bool = False,
    experts: Experts | None = None,
    low_rank: Both | None = None,
) -> Tensor:
    """Routed experts on unsorted tokens: sort, gather, experts, sum over each token's K results.

    Args:
        x_TL: tokens.
        topk_ids_TK: int64 experts of each token, each in [0, E).
        topk_weights_TK: their routing weights.
        w_up_EFL, w_down_ELF, recompute, experts, low_rank: as for :func:`grouped_mlp`.

    Returns:
        y_TL, summed in fp32 in a fixed order; gradients for all but the ids. The backward pass
        keeps the inputs and, without recompute, the pre-activation [R, F].

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, K exceeds E, or (seen on CPU
            tensors and in debug mode) ids are out of range.
    """
    expect("x_TL", x_TL, (None, None))
    expect("topk_weights_TK", topk_weights_TK, (x_TL.shape[0], None))
    expect("topk_ids_TK", topk_ids_TK, tuple(topk_weights_TK.shape), dtype=torch.int64)
    _expect_experts(x_TL, w_up_EFL, w_down_ELF)
    expect_device(
        x_TL,
        topk_ids_TK=topk_ids_TK,
        topk_weights_TK=topk_weights_TK,
        w_up_EFL=w_up_EFL,
        w_down_ELF=w_down_ELF,
    )
    n_experts, k = w_up_EFL.shape[0], topk_ids_TK.shape[1]
    if not 0 < k <= n_experts:
        raise ValueError(f"topk_ids_TK: expected 1 to {n_experts} (experts) columns, got {k}")
    expect_range("topk_ids_TK", "ids", topk_ids_TK, n_experts)
    if experts is None:
        impl, experts = _by_path(x_TL, topk_ids_TK.numel(), w_up_EFL, low_rank)
    else:
        impl = backend.implementation("moe", x_TL.device.type, x_TL.dtype, n_experts)
    slots = impl.sort_slots(topk_ids_TK, n_experts)
    matrices = (w_up_EFL, w_down_ELF, recompute)
    return _mlp(low_rank, experts, x_TL, topk_weights_TK, slots, slots.counts_E, *matrices)


def _expect_experts(x: Tensor, w_up_EFL: Tensor, w_down_ELF: Tensor) -> None:
    dtype = torch.float32 if w_up_EFL.dtype == torch.float32 else x.dtype
    expect("w_up_EFL", w_up_EFL, (None, None, x.shape[1]), dtype=dtype)
    n_experts, width, _ = w_up_EFL.shape
    expect("w_down_ELF", w_down_ELF, (n_experts, x.shape[1], width), dtype=dtype)


def _by_path(
    x: Tensor, n_rows: int, w_up_EFL: Tensor, low_rank: Both | None
) -> tuple[ModuleType, Experts]:
    """The path that takes these widths, those of low-rank parts too, and its products."""
    n_experts, inner, width = w_up_EFL.shape
    widths = [width, inner]
    both = low_rank or (None, None)
    for low, size_in, size_out in zip(both, (width, inner), (inner, width), strict=True):
        if low is not None:
            expect("A_ErI", low.A_ErI, (n_experts, None, size_in))
            expect("B_EOr", low.B_EOr, (n_experts, size_out, low.A_ErI.shape[1]))
            widths.append(low.A_ErI.shape[1])
    impl = backend.implementation("moe", x.device.type, x.dtype, n_experts, 1, *widths)
    return impl, impl.experts_for(x, n_rows, n_experts, *widths)


def _mlp(low_rank: Both | None, *given: Any) -> Tensor:
    run: Any = function.mlp if low_rank is None else partial(low_rank_mlp, low_rank=low_rank)
    result: Tensor = run(*given)
    return result
