"""Causal grouped-query attention without position encoding.

Shapes: B batch, S sequence, T cached tokens, H query heads, G key/value heads, P head dim.
"""

from __future__ import annotations

from torch import Tensor

from nemo_kernels import backend
from nemo_kernels.documents import Documents

PATHS = {"flash_attn": "nemo_kernels.attention.external"}


def attention(
    q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, documents: Documents | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(P)) v over earlier tokens of the same document: [B,S,H,P].

    Query head h reads key/value head h // (H/G).
    """
    impl = backend.implementation("attention", q_BSHP.device.type)
    return impl.attention(q_BSHP, k_BSGP, v_BSGP, documents)


def attention_step(q_BHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor) -> Tensor:
    """Attention of one new token to all T cached ones (its own included): [B,H,P]."""
    impl = backend.implementation("attention", q_BHP.device.type)
    return impl.attention_step(q_BHP, k_BTGP, v_BTGP)
