"""Causal grouped-query attention by torch's scaled_dot_product_attention: the specification.

Shapes: B batch, S sequence, T cached tokens, H query heads, G key/value heads, P head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_kernels.documents import Documents


def attention(
    q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, documents: Documents | None = None
) -> Tensor:
    # CPUs without bf16 matrix units run this twice as fast in fp32.
    dtype = torch.float32 if q_BSHP.is_cpu and q_BSHP.dtype == torch.bfloat16 else q_BSHP.dtype
    mask_B1SS = None
    if documents is not None:
        seq_idx_BS = documents.seq_idx_BS
        same_BSS = seq_idx_BS[:, :, None] == seq_idx_BS[:, None, :]
        mask_B1SS = same_BSS.tril()[:, None]
    o_BHSP = F.scaled_dot_product_attention(
        q_BSHP.transpose(1, 2).to(dtype),
        k_BSGP.transpose(1, 2).to(dtype),
        v_BSGP.transpose(1, 2).to(dtype),
        attn_mask=mask_B1SS,
        is_causal=mask_B1SS is None,
        enable_gqa=True,
    )
    return o_BHSP.transpose(1, 2).to(q_BSHP.dtype)


def attention_step(q_BHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor) -> Tensor:
    o_BH1P = F.scaled_dot_product_attention(
        q_BHP[:, :, None], k_BTGP.transpose(1, 2), v_BTGP.transpose(1, 2), enable_gqa=True
    )
    return o_BH1P[:, :, 0]
