"""Causal grouped-query attention by torch's scaled_dot_product_attention: the specification.

Shapes: B batch, S sequence, T cached tokens, H query heads, G key/value heads, P head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_kernels.documents import Documents

_MASKED = 1 << 24
"""Elements of a mask at a time."""


def attention(
    q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, documents: Documents | None = None
) -> Tensor:
    mask_B1SS = None
    if documents is not None:
        seq_idx_BS = documents.seq_idx_BS
        same_BSS = seq_idx_BS[:, :, None] == seq_idx_BS[:, None, :]
        mask_B1SS = same_BSS.tril()[:, None]
    return _attend(q_BSHP, k_BSGP, v_BSGP, mask_B1SS)


def attention_read(q_BSHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, before_B: Tensor) -> Tensor:
    tokens_S = torch.arange(q_BSHP.shape[1], device=q_BSHP.device)
    last_BS1 = (before_B[:, None] + tokens_S)[..., None]
    tokens_T = torch.arange(k_BTGP.shape[1], device=q_BSHP.device)
    # So many tokens after so many, that masks do not grow with what is cached.
    step = max(1, _MASKED // max(1, len(before_B) * len(tokens_T)))
    parts = [
        _attend(q_BsHP, k_BTGP, v_BTGP, (tokens_T <= last_Bs1)[:, None])
        for q_BsHP, last_Bs1 in zip(q_BSHP.split(step, 1), last_BS1.split(step, 1), strict=True)
    ]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _attend(q_BSHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, mask_B1ST: Tensor | None) -> Tensor:
    """Causal where there is no mask."""
    # CPUs without bf16 matrix units run this twice as fast in fp32.
    dtype = torch.float32 if q_BSHP.is_cpu and q_BSHP.dtype == torch.bfloat16 else q_BSHP.dtype
    o_BHSP = F.scaled_dot_product_attention(
        q_BSHP.transpose(1, 2).to(dtype),
        k_BTGP.transpose(1, 2).to(dtype),
        v_BTGP.transpose(1, 2).to(dtype),
        attn_mask=mask_B1ST,
        is_causal=mask_B1ST is None,
        enable_gqa=True,
    )
    return o_BHSP.transpose(1, 2).to(q_BSHP.dtype)
