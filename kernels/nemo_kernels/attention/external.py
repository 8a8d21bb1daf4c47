"""Causal attention over packed documents by the flash-attn library (2.8 interface).

Not run on a GPU yet. It takes fp16 and bf16 only; other dtypes go to the reference.

Shapes: as in reference.py; T = B*S tokens.
"""

from __future__ import annotations

import torch
from flash_attn import flash_attn_varlen_func
from torch import Tensor

from nemo_kernels.attention import by_document, reference
from nemo_kernels.backend import Sizes
from nemo_kernels.documents import Documents

DEVICE_TYPES = ("cuda",)


def attention(
    q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, documents: Documents | None = None
) -> Tensor:
    if q_BSHP.dtype not in (torch.float16, torch.bfloat16):
        return reference.attention(q_BSHP, k_BSGP, v_BSGP, documents)
    batch, length = q_BSHP.shape[:2]
    if documents is None:
        ends = torch.arange(batch + 1, device=q_BSHP.device, dtype=torch.int32)
        cu_seqlens, max_seqlen = ends * length, length
    else:
        cu_seqlens, max_seqlen = documents.cu_seqlens, documents.max_seqlen
    o_THP = flash_attn_varlen_func(
        q_BSHP.flatten(0, 1),
        k_BSGP.flatten(0, 1),
        v_BSGP.flatten(0, 1),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return o_THP.view(q_BSHP.shape)


def self_check(device_type: str, sizes: Sizes) -> float:
    return by_document.checked(attention, device_type, sizes)
