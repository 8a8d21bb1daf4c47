"""Causal depthwise convolution by the causal-conv1d library (1.6 interface).

Not run on a GPU yet. Its kernels take K from 2 to 4 and C a multiple of 8; other shapes raise
RuntimeError there, and ``choose(conv1d="reference")`` serves them.

Shapes: as in reference.py.
"""

from __future__ import annotations

import torch
from causal_conv1d import causal_conv1d_fn
from torch import Tensor

from nemo_kernels.backend import draw, relative_deviation
from nemo_kernels.conv1d import reference
from nemo_kernels.documents import Documents

DEVICE_TYPES = ("cuda",)
causal_conv1d_step = reference.causal_conv1d_step


def causal_conv1d(
    x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, documents: Documents | None = None
) -> Tensor:
    # With seq_idx the library wants channels last in memory: exactly the transpose of [B,S,C].
    seq_idx_BS = None if documents is None else documents.seq_idx_BS.contiguous()
    y_BCS = causal_conv1d_fn(
        x_BSC.contiguous().transpose(1, 2), weight_CK, bias_C, seq_idx_BS, activation="silu"
    )
    return y_BCS.transpose(1, 2)


def self_check(device_type: str) -> float:
    inputs = draw(device_type, (2, 96, 64), (64, 4), (64,))
    documents = Documents.from_numbers((torch.arange(96) // 37).expand(2, -1)).to(device_type)
    return relative_deviation(
        lambda impl, *t: impl(*t, documents), (causal_conv1d, reference.causal_conv1d), inputs
    )
