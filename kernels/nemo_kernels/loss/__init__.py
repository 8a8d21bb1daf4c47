"""Cross-entropy of a linear head, without ever holding all logits.

Shapes: R rows (tokens of the main loss and of every multi-token-prediction depth, concatenated),
D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kernels import backend

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
        ValueError: shapes or dtypes do not fit together, or chunk_size is not positive.
    """
    n_rows, width = h_RD.shape if h_RD.dim() == 2 else (None, None)
    checks = [
        ("h_RD", h_RD, [n_rows, width], h_RD.dtype),
        ("weight_VD", weight_VD, [weight_VD.shape[0], width], h_RD.dtype),
        ("labels_R", labels_R, [n_rows], torch.int64),
        ("scale_R", scale_R, [n_rows], scale_R.dtype),
    ]
    for name, x, shape, dtype in checks:
        if list(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(x.shape)}")
        if x.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}, got {x.dtype}")
    if chunk_size is not None and chunk_size <= 0:
        raise ValueError(f"chunk_size: expected a positive number, got {chunk_size}")
    impl = backend.implementation("loss", h_RD.device.type)
    return impl.linear_cross_entropy(h_RD, weight_VD, labels_R, scale_R, chunk_size)
