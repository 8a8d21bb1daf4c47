"""Grouped-query attention without position encoding: order comes from the Mamba-2 layers.

Shapes: B batch, S sequence, D hidden, H query heads, G key/value heads, P head dim.
"""

import torch
from torch import Tensor, nn

from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.cache import AttentionCache, Reading
from nemo_hybrid.model.linear import Linear
from nemo_hybrid.model.sequence import Sequences
from nemo_kernels.attention import attention_read
from nemo_kernels.documents import Packing
from nemo_kernels.lowp.scales import E4M3_MAX


class Attention(nn.Module):
    """Causal attention; documents of a packed row do not see each other.

    With ``k_scale`` and ``v_scale``, which exports have, keys and values are cached in FP8 (E4M3),
    divided by them, and what is beyond becomes the largest number of that."""

    def __init__(self, cfg: ModelConfig, sequence: Sequences) -> None:
        super().__init__()
        self.sequence = sequence
        self.head_dim, self.kv_heads = cfg.head_dim, cfg.num_key_value_heads
        q_size = cfg.num_attention_heads * cfg.head_dim
        kv_size = cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, q_size)
        self.k_proj = Linear(cfg.hidden_size, kv_size)
        self.v_proj = Linear(cfg.hidden_size, kv_size)
        self.o_proj = Linear(q_size, cfg.hidden_size)
        self.k_scale: float | None = None
        self.v_scale: float | None = None

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [.., H, P], k and v [.., G, P] of x [.., D]."""
        q, k, v = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
        split = (-1, self.head_dim)
        return q.unflatten(-1, split), k.unflatten(-1, split), v.unflatten(-1, split)

    def forward(self, x_BSD: Tensor, documents: Packing = None) -> Tensor:
        q_BSHP, k_BSGP, v_BSGP = self._heads(x_BSD)
        o_BSHP = self.sequence.attend(q_BSHP, k_BSGP, v_BSGP, documents)
        return self.o_proj(o_BSHP.flatten(-2))

    def new_cache(self, rows: int, tokens: int, like: Tensor) -> AttentionCache:
        # Not empty: what is not looked at must still be finite.
        shape = (rows, tokens, self.kv_heads, self.head_dim)
        dtypes = (_dtype(scale, like) for scale in (self.k_scale, self.v_scale))
        return AttentionCache(*(like.new_zeros(shape, dtype=dtype) for dtype in dtypes))

    def read(self, x_BSD: Tensor, cache: AttentionCache, reading: Reading) -> tuple[Tensor, None]:
        return self._read(x_BSD, cache, reading.before_B), None

    def decode(self, x_BD: Tensor, cache: AttentionCache, before_B: Tensor) -> Tensor:
        return self._read(x_BD[:, None], cache, before_B)[:, 0]

    def _read(self, x_BSD: Tensor, cache: AttentionCache, before_B: Tensor) -> Tensor:
        q_BSHP, k_BSGP, v_BSGP = self._heads(x_BSD)
        cache.write(_code(k_BSGP, self.k_scale), _code(v_BSGP, self.v_scale), before_B)
        k_BTGP = _number(cache.k_BTGP, self.k_scale, q_BSHP)
        v_BTGP = _number(cache.v_BTGP, self.v_scale, q_BSHP)
        return self.o_proj(attention_read(q_BSHP, k_BTGP, v_BTGP, before_B).flatten(-2))


def _dtype(scale: float | None, like: Tensor) -> torch.dtype:
    return like.dtype if scale is None else torch.float8_e4m3fn


def _code(x: Tensor, scale: float | None) -> Tensor:
    """As it is cached."""
    if scale is None:
        return x
    return (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _number(code: Tensor, scale: float | None, like: Tensor) -> Tensor:
    return code if scale is None else (code.float() * scale).to(like.dtype)
