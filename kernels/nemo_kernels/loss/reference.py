"""Losses of a linear head in row chunks, plain PyTorch: the specification.

Shapes: R rows, N rows with a non-zero scale, C rows of one chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nemo_kernels.products import add_fp32_product, mm

# Logits of one chunk: small enough to stay in a CPU's second-level caches between the passes over
# them; on a GPU, large enough to fill it.
_CHUNK_BYTES = {"cpu": 4 << 20}
_CHUNK_BYTES_GPU = 256 << 20
_KL_CHUNK_BYTES = 64 << 20  # of one model's logits


def linear_cross_entropy(
    h_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    scale_R: Tensor,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    if chunk_size is None:
        budget = _CHUNK_BYTES.get(h_RD.device.type, _CHUNK_BYTES_GPU)
        chunk_size = max(16, budget // (4 * weight_VD.shape[0]))
    return LinearCrossEntropy.apply(
        h_RD, weight_VD, labels_R, scale_R, chunk_size, torch.is_grad_enabled()
    )


class HeadLoss(torch.autograd.Function):
    """A loss whose gradients for h and head, linear in its own, the forward pass has made."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _dce_R: Tensor) -> tuple[Tensor | None, ...]:
        dh_RD, dweight_VD = ctx.saved_tensors
        if dh_RD is not None:
            dh_RD = torch.mul(dh_RD, dloss, out=torch.empty_like(dh_RD))
        if dweight_VD is not None:
            # The only rounding of the weight gradient.
            rounded = torch.empty_like(dweight_VD, dtype=ctx.weight_dtype)
            dweight_VD = torch.mul(dweight_VD, dloss, out=rounded)
        return dh_RD, dweight_VD, None, None, None, None


class LinearCrossEntropy(HeadLoss):
    """Loss, and in the same pass both gradients, which are linear in the loss's own gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        h_RD: Tensor,
        weight_VD: Tensor,
        labels_R: Tensor,
        scale_R: Tensor,
        chunk_size: int,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        acc = torch.float64 if h_RD.dtype == torch.float64 else torch.float32
        need_h = with_grad and ctx.needs_input_grad[0]
        need_weight = with_grad and ctx.needs_input_grad[1]
        rows_N = scale_R.nonzero().squeeze(1)
        ce_R = torch.zeros(h_RD.shape[0], dtype=acc, device=h_RD.device)
        dh_RD = torch.zeros_like(h_RD) if need_h else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=acc) if need_weight else None
        w_VD = weight_VD.to(acc)
        for rows_C in rows_N.split(chunk_size):
            h_CD = h_RD.index_select(0, rows_C).to(acc)
            label_C1 = labels_R.index_select(0, rows_C)[:, None]
            p_CV = mm(h_CD, w_VD.t())
            p_CV.sub_(p_CV.amax(1, keepdim=True))
            label_logit_C1 = p_CV.gather(1, label_C1)
            sum_C1 = p_CV.exp_().sum(1, keepdim=True)
            ce_R[rows_C] = (sum_C1.log() - label_logit_C1).squeeze(1)
            if not (need_h or need_weight):
                continue
            scale_C1 = scale_R.index_select(0, rows_C).to(acc)[:, None]
            p_CV.mul_(scale_C1 / sum_C1).scatter_add_(1, label_C1, -scale_C1)
            if dh_RD is not None:
                dh_RD[rows_C] = mm(p_CV, w_VD).to(h_RD.dtype)
            if dweight_VD is not None:
                add_fp32_product(dweight_VD, p_CV.t(), h_CD)
        ctx.save_for_backward(dh_RD, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(ce_R)
        return torch.dot(ce_R, scale_R.to(acc)), ce_R


def linear_kl(
    h_RD: Tensor,
    weight_VD: Tensor,
    teacher_RD: Tensor,
    teacher_VD: Tensor,
    scale_R: Tensor,
    chunk_size: int | None = None,
) -> Tensor:
    """A chunk's logits are there at a time, and once more in the backward pass."""
    chunk_size = chunk_size or max(1, _KL_CHUNK_BYTES // (4 * len(weight_VD)))
    heads = weight_VD.float(), teacher_VD.float()
    total = torch.zeros((), device=h_RD.device)
    rows = zip(*(t.split(chunk_size) for t in (h_RD, teacher_RD, scale_R)), strict=True)
    for part in rows:
        total = total + checkpoint(
            _chunk_kl, *part, *heads, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _chunk_kl(
    h_CD: Tensor, teacher_CD: Tensor, scale_C: Tensor, weight_VD: Tensor, teacher_VD: Tensor
) -> Tensor:
    q_CV, p_CV = (
        F.linear(h.float(), head).log_softmax(-1)
        for h, head in ((h_CD, weight_VD), (teacher_CD, teacher_VD))
    )
    return F.kl_div(q_CV, p_CV, log_target=True, reduction="none").sum(-1) @ scale_C
