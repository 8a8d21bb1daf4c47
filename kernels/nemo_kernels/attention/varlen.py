"""Causal attention over packed documents by torch's own kernel for them (FlashAttention-2).

Not run on a GPU yet. It takes fp16 and bf16, and its backward pass is deterministic where torch is
asked for such algorithms. Other dtypes go document by document, rows that are one document to
scaled_dot_product_attention. No mask is made, and nothing is kept for pairs of tokens.

Shapes: as in reference.py; T = B*S tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from nemo_kernels.attention import by_document, reference
from nemo_kernels.backend import Sizes
from nemo_kernels.documents import Documents

DEVICE_TYPES = ("cuda",)
_MAX_HEAD = 256


def options(function: Callable[..., Any]) -> dict[str, Any]:
    """What makes it causal and grouped. Groups of heads are an argument since torch 2.12; 2.11
    takes them without. Raises ImportError: it knows no windows (before torch 2.11)."""
    names = inspect.signature(function).parameters
    if "window_size" not in names:
        raise ImportError("varlen_attn of this torch has no argument window_size")
    return {"window_size": (-1, 0), **({"enable_gqa": True} if "enable_gqa" in names else {})}


_OPTIONS = options(varlen_attn)


def attention(
    q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, documents: Documents | None = None
) -> Tensor:
    width = q_BSHP.shape[-1]
    taken = q_BSHP.dtype in (torch.float16, torch.bfloat16)
    if not taken or width % 8 or width > _MAX_HEAD:
        return by_document.attention(q_BSHP, k_BSGP, v_BSGP, documents)
    if documents is None:
        return reference.attention(q_BSHP, k_BSGP, v_BSGP)
    ends, longest = documents.cu_seqlens, documents.max_seqlen
    q_THP, k_TGP, v_TGP = (t.flatten(0, 1) for t in (q_BSHP, k_BSGP, v_BSGP))
    o_THP = varlen_attn(q_THP, k_TGP, v_TGP, ends, ends, longest, longest, **_OPTIONS)
    assert isinstance(o_THP, Tensor)  # without further results, which are not asked for
    return o_THP.view(q_BSHP.shape)


def self_check(device_type: str, sizes: Sizes) -> float:
    return by_document.checked(attention, device_type, sizes)
