"""Losses of a linear head on GPUs: products by libraries, Triton for what lies between them.

Logits and all sums are fp32. A chunk's logits come from a product of h and head in their own dtype;
one kernel finds each row's maximum and sum of exponentials, a second one makes the gradient of the
logits, rounded to h's dtype (in bf16: by 2^-9), of which two products make those of h and head,
with fp32 results. The head's is summed in fp32 and rounded once. Rows do not mix, nothing is added
atomically, and nothing waits for the GPU: a row whose scale is 0 is passed over where it stands, so
its hidden state must be finite.

Shapes: R rows, C rows of one chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from nemo_kernels.backend import Sizes, draw, relative_deviation
from nemo_kernels.launch import launch
from nemo_kernels.loss import reference, softmax_kernel
from nemo_kernels.products import add_fp32_product, fp32_product

DEVICE_TYPES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)
"""CPU tensors only in Triton's interpreter."""
_DTYPES = (torch.bfloat16, torch.float32)
_CHUNK_BYTES = 2 << 30  # of logits; each chunk also reads and writes the head's whole gradient
_COLUMNS = 4096
_OPTIONS = {"BLOCK": _COLUMNS, "num_warps": 8, "num_stages": 2}

Compare = Callable[[slice, Tensor, Tensor, "Tensor | None"], None]
"""Of these rows' logits [C, V] write values [C] and, if there is room for it, their scaled gradient
[C, V]."""


def refusal(dtype: torch.dtype) -> str:
    """fp16 would lose small gradients of logits."""
    return "" if dtype in _DTYPES else f"expected one of {_DTYPES}, got {dtype}"


def linear_cross_entropy(
    h_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    scale_R: Tensor,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``nemo_kernels.loss.linear_cross_entropy``. A label out of range makes the loss NaN."""
    scale_R, labels_R = scale_R.float().contiguous(), labels_R.contiguous()

    def compare(
        rows: slice, logits_CV: Tensor, value_C: Tensor, gradient_CV: Tensor | None
    ) -> None:
        labels_C, scale_C = labels_R[rows], scale_R[rows]
        sums_C2 = _sums(logits_CV, scale_C, labels_C, value_C)
        if gradient_CV is not None:
            grid = (gradient_CV.shape[0] * triton.cdiv(gradient_CV.shape[1], _COLUMNS),)
            given = (logits_CV, sums_C2, labels_C, scale_C, gradient_CV, gradient_CV.shape[1])
            launch(softmax_kernel.cross_entropy_gradient_kernel, grid, *given, **_OPTIONS)

    return _apply(h_RD, weight_VD, compare, scale_R, chunk_size or _rows_of(weight_VD))


def linear_kl(
    h_RD: Tensor,
    weight_VD: Tensor,
    teacher_RD: Tensor,
    teacher_VD: Tensor,
    scale_R: Tensor,
    chunk_size: int | None = None,
) -> Tensor:
    """``nemo_kernels.loss.linear_kl``."""
    scale_R = scale_R.float().contiguous()

    def compare(
        rows: slice, logits_CV: Tensor, value_C: Tensor, gradient_CV: Tensor | None
    ) -> None:
        scale_C, teacher_CV = scale_R[rows], fp32_product(teacher_RD[rows], teacher_VD.t())
        both = (logits_CV, teacher_CV)
        sums = [_sums(x_CV, scale_C) for x_CV in both]
        given = (*both, *sums, scale_C, value_C, gradient_CV, logits_CV.shape[1])
        launch(softmax_kernel.divergence_kernel, (len(logits_CV),), *given, **_OPTIONS)

    return _apply(h_RD, weight_VD, compare, scale_R, chunk_size or _rows_of(weight_VD) // 2)[0]


def self_check(device_type: str, sizes: Sizes) -> float:
    """Largest deviation of both losses from the reference, over chunks of which the last one is not
    whole."""
    shapes = ((20, 64), (sizes.vocabulary, 64))
    h_RD, weight_VD, teacher_RD, teacher_VD = draw(device_type, *shapes, *shapes)
    labels_R = torch.arange(20, device=device_type) * (sizes.vocabulary // 20)
    scale_R = torch.linspace(-1, 1, 20, device=device_type).relu()
    cross_entropy = relative_deviation(
        lambda loss, h, w: loss(h, w, labels_R, scale_R, 16)[0],
        (linear_cross_entropy, reference.linear_cross_entropy),
        (h_RD, weight_VD),
    )
    divergence = relative_deviation(
        lambda loss, h, w: loss(h, w, teacher_RD.flip(0), teacher_VD, scale_R, 16),
        (linear_kl, reference.linear_kl),
        (h_RD, weight_VD),
    )
    return max(cross_entropy, divergence)


class _Chunked(reference.HeadLoss):
    """sum_r scale_r * value_r, of values that are made from logits."""

    @staticmethod
    def forward(
        ctx: Any,
        h_RD: Tensor,
        weight_VD: Tensor,
        compare: Compare,
        scale_R: Tensor,
        chunk_size: int,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        need_h, need_weight = (with_grad and need for need in ctx.needs_input_grad[:2])
        value_R = torch.empty_like(scale_R)
        dh_RD = torch.empty_like(h_RD) if need_h else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        for first in range(0, len(h_RD), chunk_size):
            rows = slice(first, min(first + chunk_size, len(h_RD)))
            h_CD, gradient_CV = h_RD[rows], None
            logits_CV = fp32_product(h_CD, weight_VD.t())
            if need_h or need_weight:
                gradient_CV = torch.empty_like(logits_CV, dtype=h_RD.dtype)
            compare(rows, logits_CV, value_R[rows], gradient_CV)
            del logits_CV
            if gradient_CV is not None and dh_RD is not None:
                dh_RD[rows] = fp32_product(gradient_CV, weight_VD)
            if gradient_CV is not None and dweight_VD is not None:
                add_fp32_product(dweight_VD, gradient_CV.t(), h_CD)
        ctx.save_for_backward(dh_RD, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(value_R)
        return torch.dot(value_R, scale_R), value_R


def _apply(
    h_RD: Tensor, weight_VD: Tensor, compare: Compare, scale_R: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    return _Chunked.apply(h_RD, weight_VD, compare, scale_R, chunk_size, torch.is_grad_enabled())


def _rows_of(weight_VD: Tensor) -> int:
    return max(16, _CHUNK_BYTES // (4 * len(weight_VD)))


def _sums(
    logits_CV: Tensor,
    scale_C: Tensor,
    labels_C: Tensor | None = None,
    value_C: Tensor | None = None,
) -> Tensor:
    """Of each row the largest logit and the sum of exp(logit - largest); and, where there are
    labels, write the cross-entropy."""
    sums_C2 = logits_CV.new_empty(len(logits_CV), 2)
    given = (logits_CV, scale_C, labels_C, sums_C2, value_C, logits_CV.shape[1])
    launch(softmax_kernel.sums_kernel, (len(logits_CV),), *given, **_OPTIONS)
    return sums_C2
