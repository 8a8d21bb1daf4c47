"""Causal attention over packed documents by the flash-attn library (2.8 interface).

Not run on a GPU yet. It takes fp16 and bf16 only; other dtypes go to the reference.

Shapes: as in reference.py; T = B*S tokens.
"""

from __future__ import annotations

import torch
from flash_attn import flash_attn_varlen_func
from torch import Tensor

from nemo_kernels.attention import reference
from nemo_kernels.backend import relative_deviation

DEVICE_TYPES = ("cuda",)
attention_step = reference.attention_step


def attention(
    q_BSHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    seq_idx_BS: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    if q_BSHP.dtype not in (torch.float16, torch.bfloat16):
        return reference.attention(q_BSHP, k_BSGP, v_BSGP, seq_idx_BS)
    batch, length = q_BSHP.shape[:2]
    if seq_idx_BS is None:
        ends = torch.arange(batch + 1, device=q_BSHP.device, dtype=torch.int32)
        cu_seqlens, max_seqlen = ends * length, length
    elif cu_seqlens is None:
        cu_seqlens = _document_bounds(seq_idx_BS)
    if max_seqlen is None:
        max_seqlen = length  # an upper bound serves and costs no host sync
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


def _document_bounds(seq_idx_BS: Tensor) -> Tensor:
    """Positions in [T] where documents begin, and T: int32, one more than documents."""
    starts_BS = torch.ones_like(seq_idx_BS, dtype=torch.bool)
    starts_BS[:, 1:] = seq_idx_BS[:, 1:] != seq_idx_BS[:, :-1]
    starts = starts_BS.flatten().nonzero()[:, 0]
    return torch.cat((starts, starts.new_tensor([seq_idx_BS.numel()]))).to(torch.int32)


def self_check(device_type: str) -> float:
    generator = torch.Generator(device_type).manual_seed(0)
    q_BSHP, k_BSGP, v_BSGP = (
        torch.randn(shape, generator=generator, device=device_type, dtype=torch.bfloat16)
        for shape in ((2, 96, 4, 64), (2, 96, 2, 64), (2, 96, 2, 64))
    )
    seq_idx_BS = (torch.arange(96, device=device_type) // 37).to(torch.int32).expand(2, -1)
    return relative_deviation(
        lambda impl, *t: impl(*t, seq_idx_BS),
        (attention, reference.attention),
        (q_BSHP, k_BSGP, v_BSGP),
    )
