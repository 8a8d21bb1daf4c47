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
    mask_B1SS = None
    if documents is not None:
        seq_idx_BS = documents.seq_idx_BS
        same_BSS = seq_idx_BS[:, :, None] == seq_idx_BS[:, None, :]
        mask_B1SS = same_BSS.tril()[:, None]
    return _attend(q_BSHP, k_BSGP, v_BSGP, mask_B1SS)


def attention_read(q_BSHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, before_B: Tensor) -> Tensor:
    tokens_S = torch.arange(q_BSHP.shape[1], device=q_BSHP.device)
    last_BS1 = (before_B[:, None] + tokens_S)[..., None]
    seen_BST = torch.arange(k_BTGP.shape[1], device=q_BSHP.device) <= last_BS1
    return _attend(q_BSHP, k_BTGP, v_BTGP, seen_BST[:, None])


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
