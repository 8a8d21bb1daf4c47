"""Causal grouped-query attention without position encoding.

Shapes: B batch, S sequence, T cached tokens, H query heads, G key/value heads, P head dim.
"""

from __future__ import annotations

from torch import Tensor

from nemo_kernels import backend
from nemo_kernels.attention import reference
from nemo_kernels.checks import expect, expect_device
from nemo_kernels.documents import Documents

PATHS = {
    "varlen": "nemo_kernels.attention.varlen",
    "flash_attn": "nemo_kernels.attention.external",
    "by_document": "nemo_kernels.attention.by_document",
}


def attention(
    q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, documents: Documents | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(P)) v over earlier tokens of the same document: [B,S,H,P].

    Query head h reads key/value head h // (H/G).
    Raises ValueError: shapes, dtypes or devices do not fit together.
    """
    expect("q_BSHP", q_BSHP, (None, None, None, None))
    batch, length, heads, width = q_BSHP.shape
    for name, t in (("k_BSGP", k_BSGP), ("v_BSGP", v_BSGP)):
        expect(name, t, (batch, length, k_BSGP.shape[-2], width), dtype=q_BSHP.dtype)
    if heads % k_BSGP.shape[2]:
        raise ValueError(f"k_BSGP: expected a divisor of {heads} (heads), got {k_BSGP.shape[2]}")
    expect_device(q_BSHP, k_BSGP=k_BSGP, v_BSGP=v_BSGP)
    if documents is not None:
        expect("documents.seq_idx_BS", documents.seq_idx_BS, (batch, length))
    impl = backend.implementation("attention", q_BSHP.device.type)
    return impl.attention(q_BSHP, k_BSGP, v_BSGP, documents)


def attention_read(q_BSHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, before_B: Tensor) -> Tensor:
    """Attention of S new tokens to cached ones of their row, their own included: [B,S,H,P].

    Token s of row b sees the first ``before_B[b] + s + 1`` of the T keys and values; what stands
    behind them must be finite, and changes nothing. On every path as in the reference.
    """
    return reference.attention_read(q_BSHP, k_BTGP, v_BTGP, before_B)
