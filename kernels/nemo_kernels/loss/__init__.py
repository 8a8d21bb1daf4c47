"""Cross-entropy and divergence of a linear head, without ever holding all logits.

Shapes: R rows (tokens of the main loss and of every multi-token-prediction depth, concatenated),
D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kernels import backend
from nemo_kernels.checks import expect, expect_device, expect_range

__all__ = ["PATHS", "linear_cross_entropy", "linear_kl"]

PATHS = {"triton": "nemo_kernels.loss.kernel"}


def linear_cross_entropy(
    h_RD: Tensor,
    weight_VD: Tensor,
    labels_R: Tensor,
    scale_R: Tensor,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``sum_r scale_r * CE(h_r @ weight^T, labels_r)``.

    The forward pass computes the gradients too (not under ``torch.no_grad``), so no logits are
    kept. The weight's gradient is summed in fp32 over all rows and rounded to the weight's dtype
    once: with all shares of a shared head in one call, small ones are not lost.

    Args:
        h_RD: rows; weight_VD: head, in the same dtype.
        labels_R: int64 targets, in [0, V) where the scale is not 0.
        scale_R: fp32 factor per row; rows with 0 are skipped.
        chunk_size: rows whose logits are held at once; default by device.

    Returns:
        the loss, an fp32 scalar with gradients for h and weight, and ``ce_R``, fp32, detached:
        each row's cross-entropy, 0 where the scale is 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, chunk_size is not positive, or
            (seen on CPU tensors only) a label is out of range where the scale is not 0.
    """
    n_rows = _expect_head("h_RD", h_RD, "weight_VD", weight_VD)
    expect("labels_R", labels_R, (n_rows,), dtype=torch.int64)
    expect("scale_R", scale_R, (n_rows,))
    expect_device(h_RD, weight_VD=weight_VD, labels_R=labels_R, scale_R=scale_R)
    expect_range("labels_R", "labels", labels_R.masked_fill(scale_R == 0, 0), weight_VD.shape[0])
    _expect_chunk(chunk_size)
    impl = backend.implementation("loss", h_RD.device.type, h_RD.dtype)
    return impl.linear_cross_entropy(h_RD, weight_VD, labels_R, scale_R, chunk_size)


def linear_kl(
    h_RD: Tensor,
    weight_VD: Tensor,
    teacher_RD: Tensor,
    teacher_VD: Tensor,
    scale_R: Tensor,
    chunk_size: int | None = None,
) -> Tensor:
    """``sum_r scale_r * KL(teacher_r || model_r)`` between the softmax of ``h @ weight^T`` and that
    of the teacher's.

    Args:
        h_RD: rows; weight_VD: head, in the same dtype.
        teacher_RD, teacher_VD: the same of the teacher, which gets no gradient; its width and dtype
            may be others.
        scale_R: fp32 factor per row.
        chunk_size: rows whose logits are held at once; default by device.

    Returns:
        an fp32 scalar with gradients for h and weight; the weight's is summed in fp32 over all rows
        and rounded once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or chunk_size is not positive.
    """
    n_rows = _expect_head("h_RD", h_RD, "weight_VD", weight_VD)
    _expect_head("teacher_RD", teacher_RD, "teacher_VD", teacher_VD)
    expect("teacher_RD", teacher_RD, (n_rows, None))
    expect("teacher_VD", teacher_VD, (weight_VD.shape[0], None))
    expect("scale_R", scale_R, (n_rows,))
    others = {"teacher_RD": teacher_RD, "teacher_VD": teacher_VD, "scale_R": scale_R}
    expect_device(h_RD, weight_VD=weight_VD, **others)
    _expect_chunk(chunk_size)
    impl = backend.implementation("loss", h_RD.device.type, h_RD.dtype)
    teacher = teacher_RD.detach(), teacher_VD.detach()
    return impl.linear_kl(h_RD, weight_VD, *teacher, scale_R, chunk_size)


def _expect_head(h_name: str, h_RD: Tensor, name: str, weight_VD: Tensor) -> int:
    """R, of rows and a head that fit together."""
    expect(h_name, h_RD, (None, None))
    expect(name, weight_VD, (None, h_RD.shape[1]), dtype=h_RD.dtype)
    return h_RD.shape[0]


def _expect_chunk(chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size <= 0:
        raise ValueError(f"chunk_size: expected a positive number, got {chunk_size}")
