"""Cross-entropy of a linear head, without ever holding all logits.

Shapes: R rows (tokens of the main loss and of every multi-token-prediction depth, concatenated),
D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kernels import backend
from nemo_kernels.checks import expect, expect_range

__all__ = ["PATHS", "linear_cross_entropy"]

PATHS: dict[str, str] = {}


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
        ValueError: shapes or dtypes do not fit together, chunk_size is not positive, or (seen on
            CPU tensors only) a label is out of range where the scale is not 0.
    """
    expect("h_RD", h_RD, (None, None))
    n_rows, width = h_RD.shape
    expect("weight_VD", weight_VD, (None, width), dtype=h_RD.dtype)
    expect("labels_R", labels_R, (n_rows,), dtype=torch.int64)
    expect("scale_R", scale_R, (n_rows,))
    expect_range("labels_R", "labels", labels_R.masked_fill(scale_R == 0, 0), weight_VD.shape[0])
    if chunk_size is not None and chunk_size <= 0:
        raise ValueError(f"chunk_size: expected a positive number, got {chunk_size}")
    impl = backend.implementation("loss", h_RD.device.type)
    return impl.linear_cross_entropy(h_RD, weight_VD, labels_R, scale_R, chunk_size)
