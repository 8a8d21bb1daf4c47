"""Causal depthwise convolution by the causal-conv1d library (1.6 interface).

Not run on a GPU yet. Its kernels take K from 2 to 4, C a multiple of 8, and have 32-bit offsets.

Shapes: as in reference.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn
from torch import Tensor

from nemo_kernels.backend import Sizes
from nemo_kernels.conv1d import kernel, reference
from nemo_kernels.documents import Documents

DEVICE_TYPES = ("cuda",)
MAX_OFFSET = 2**32
_CHUNK = 64
"""Tokens that the library's forward pass takes at a time, where it has 16-bit numbers."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
causal_conv1d_step = reference.causal_conv1d_step


def refusal(x: Tensor, weight_CK: Tensor) -> str:
    """Of x, once it lies in one piece, and such a weight."""
    channels, taps = weight_CK.shape
    fits = channels % 8 == 0 and 2 <= taps <= 4
    if fits and x.dtype in _DTYPES and x.numel() <= MAX_OFFSET:
        return ""
    return (
        f"expected one of {_DTYPES}, at most {MAX_OFFSET} elements, channels a multiple of 8 and 2 "
        f"to 4 taps, got {x.dtype}, {list(x.shape)} and {list(weight_CK.shape)}"
    )


def causal_conv1d(
    x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, documents: Documents | None = None
) -> Tensor:
    """``nemo_kernels.conv1d.causal_conv1d``."""
    length, seq_idx_BS = x_BSC.shape[1], None
    if documents is not None:  # of which the library's forward pass reads whole chunks
        pad = -length % _CHUNK
        seq_idx_BS = F.pad(documents.seq_idx_BS, (0, pad), value=-1)
        x_BSC = F.pad(x_BSC, (0, 0, 0, pad))
    # With seq_idx the library wants channels last in memory: exactly the transpose of [B,S,C].
    y_BCS = causal_conv1d_fn(
        x_BSC.contiguous().transpose(1, 2), weight_CK, bias_C, seq_idx_BS, activation="silu"
    )
    return y_BCS.transpose(1, 2)[:, :length]


def self_check(device_type: str, sizes: Sizes) -> float:
    return kernel.checked(causal_conv1d, device_type, sizes)
