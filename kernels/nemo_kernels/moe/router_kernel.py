"""Router scores, choice of experts and routing weights in one kernel, and their backward pass.

The logits come from a matrix product in fp32; one program then does everything else for a token,
with all its scores in registers. The backward pass likewise makes the gradient of the logits, from
which two matrix products make those of tokens and router weight.

Shapes: T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kernels.launch import launch
from nemo_kernels.moe.sort_kernel import padded
from nemo_kernels.products import fp32_product, split_product

MAX_CHOICES = 32
# A warp holds a token: sums and maxima need no shared memory.
_OPTIONS: dict[str, Any] = {"num_warps": 1, "num_stages": 3}


def topk_router(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor,
    k: int,
    scaling_factor: float,
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``nemo_kernels.moe.topk_router``.

    A token's experts come in the order of their biased scores; of equal ones the lower id is first.
    NaN counts as the highest score, so that K different ids within range come out in any case. The
    backward pass keeps x, the router weight, the ids and the scores.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Router.apply(
        x_TD, weight_ED, bias_E, k, float(scaling_factor), normalize
    )
    return result


class _Router(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_ED: Tensor,
        bias_E: Tensor,
        k: int,
        scaling_factor: float,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (n_tokens, _), n_experts = x_TD.shape, weight_ED.shape[0]
        logits_TE = _logits(x_TD, weight_ED)
        ids_TK = torch.empty(n_tokens, k, dtype=torch.int64, device=x_TD.device)
        weights_TK = torch.empty_like(ids_TK, dtype=torch.float32)
        scores_TE = torch.empty_like(logits_TE)
        tensors = (logits_TE, bias_E.float().contiguous(), ids_TK, weights_TK, scores_TE)
        sizes = (n_experts, k, scaling_factor, int(normalize), padded(n_experts), MAX_CHOICES)
        launch(_router_kernel, (n_tokens,), *tensors, *sizes, **_OPTIONS)
        ctx.mark_non_differentiable(ids_TK)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_TD, weight_ED, ids_TK, scores_TE)
        ctx.scaling_factor, ctx.normalize = scaling_factor, normalize
        return ids_TK, weights_TK, scores_TE

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: None, dweights_TK: Tensor | None, dscores_TE: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED, ids_TK, scores_TE = ctx.saved_tensors
        (n_tokens, k), n_experts = ids_TK.shape, scores_TE.shape[1]
        # Without a balance loss there is no such gradient: all tokens read the same zeros.
        stride = n_experts if dscores_TE is not None else 0
        if dscores_TE is None:
            dscores_TE = scores_TE.new_zeros(n_experts)
        if dweights_TK is None:
            dweights_TK = scores_TE.new_zeros(n_tokens, k)
        dlogits_TE = torch.empty_like(scores_TE)
        gradients = (dweights_TK.contiguous(), dscores_TE.contiguous())
        sizes = (stride, n_experts, k, ctx.scaling_factor, int(ctx.normalize))
        tensors = (*gradients, ids_TK, scores_TE, dlogits_TE)
        choices = (padded(n_experts), MAX_CHOICES)
        launch(_router_backward_kernel, (n_tokens,), *tensors, *sizes, *choices, **_OPTIONS)
        dx_TD = dweight_ED = None
        if ctx.needs_input_grad[0]:
            dx_TD = split_product(dlogits_TE, weight_ED).to(x_TD.dtype)
        if ctx.needs_input_grad[1]:
            dweight_ED = split_product(dlogits_TE.t(), x_TD).to(weight_ED.dtype)
        return dx_TD, dweight_ED, None, None, None, None


def _logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """In fp32. Products of bf16 numbers are exact there, so a GPU's matrix units serve as well: the
    order of the sums is all that differs."""
    if x_TD.dtype == weight_ED.dtype == torch.bfloat16:
        return fp32_product(x_TD, weight_ED.t())
    return torch.mm(x_TD.float(), weight_ED.float().t())


@triton.jit(do_not_specialize=["k", "normalize"])
def _router_kernel(
    logits_TE, bias_E, ids_TK, weights_TK, scores_TE, n_experts, k, scaling_factor, normalize,
    EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """One token: the highest of the remaining experts is taken k times."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < n_experts
    at = token * n_experts + expert
    score = tl.sigmoid(tl.load(logits_TE + at, mask=is_expert, other=0).to(tl.float32))
    tl.store(scores_TE + at, score, mask=is_expert)
    biased = score + tl.load(bias_E + expert, mask=is_expert, other=0).to(tl.float32)
    # As integers in the same order, where NaN can be the highest and -2**31 is no number's value.
    bits = biased.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rank = tl.where(biased != biased, 0x7FFFFFFF, rank)
    rank = tl.where(is_expert, rank, -0x80000000)

    choice = tl.arange(0, CHOICES)
    ids = tl.zeros([CHOICES], tl.int32)
    chosen = tl.zeros([CHOICES], tl.float32)
    for i in range(0, k):
        best = tl.min(tl.where(rank == tl.max(rank, 0), expert, EXPERTS), 0)
        rank = tl.where(expert == best, -0x80000000, rank)
        ids = tl.where(choice == i, best, ids)
        chosen = tl.where(choice == i, tl.sum(tl.where(expert == best, score, 0.0), 0), chosen)
    total = tl.where(normalize != 0, tl.sum(chosen, 0) + 1e-20, 1.0)
    at = token * k + choice
    tl.store(ids_TK + at, ids.to(tl.int64), mask=choice < k)
    tl.store(weights_TK + at, chosen / total * scaling_factor, mask=choice < k)


@triton.jit(do_not_specialize=["k", "normalize"])
def _router_backward_kernel(
    dweights_TK, dscores_TE, ids_TK, scores_TE, dlogits_TE, dscores_stride,
    n_experts, k, scaling_factor, normalize, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """One token. With w_i = scale * s_i / total over its choices, and total = sum of s_j:
    ds_i = scale * (dw_i - sum_j(dw_j * s_j) / total) / total; without normalising, scale * dw_i."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < n_experts
    score = tl.load(scores_TE + token * n_experts + expert, mask=is_expert, other=0).to(tl.float32)
    at = token * dscores_stride + expert
    dscore = tl.load(dscores_TE + at, mask=is_expert, other=0).to(tl.float32)

    choice = tl.arange(0, CHOICES)
    at = token * k + choice
    ids = tl.load(ids_TK + at, mask=choice < k, other=0).to(tl.int32)
    dweight = tl.load(dweights_TK + at, mask=choice < k, other=0).to(tl.float32)
    chosen = tl.gather(score, ids, 0)
    chosen = tl.where(choice < k, chosen, 0.0)
    total = tl.sum(chosen, 0) + 1e-20
    normalized = (dweight - tl.sum(dweight * chosen, 0) / total) / total
    dchosen = scaling_factor * tl.where(normalize != 0, normalized, dweight)
    for i in range(0, k):
        id = tl.sum(tl.where(choice == i, ids, 0), 0)
        dscore += tl.where(expert == id, tl.sum(tl.where(choice == i, dchosen, 0.0), 0), 0.0)
    dlogit = dscore * score * (1 - score)
    tl.store(dlogits_TE + token * n_experts + expert, dlogit, mask=is_expert)
