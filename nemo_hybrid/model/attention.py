"""Grouped-query attention without position encoding: order comes from the Mamba-2 layers.

Shapes: B batch, S sequence, D hidden, H query heads, G key/value heads, P head dim.
"""

from torch import Tensor, nn

from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.cache import AttentionCache, Reading
from nemo_hybrid.model.linear import Linear
from nemo_kernels.attention import attention, attention_read
from nemo_kernels.documents import Documents


class Attention(nn.Module):
    """Causal attention; documents of a packed row do not see each other."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.kv_heads = cfg.head_dim, cfg.num_key_value_heads
        q_size = cfg.num_attention_heads * cfg.head_dim
        kv_size = cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, q_size)
        self.k_proj = Linear(cfg.hidden_size, kv_size)
        self.v_proj = Linear(cfg.hidden_size, kv_size)
        self.o_proj = Linear(q_size, cfg.hidden_size)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [.., H, P], k and v [.., G, P] of x [.., D]."""
        q, k, v = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
        split = (-1, self.head_dim)
        return q.unflatten(-1, split), k.unflatten(-1, split), v.unflatten(-1, split)

    def forward(self, x_BSD: Tensor, documents: Documents | None = None) -> Tensor:
        q_BSHP, k_BSGP, v_BSGP = self._heads(x_BSD)
        o_BSHP = attention(q_BSHP, k_BSGP, v_BSGP, documents)
        return self.o_proj(o_BSHP.flatten(-2))

    def new_cache(self, rows: int, tokens: int, like: Tensor) -> AttentionCache:
        # Not empty: what is not looked at must still be finite.
        shape = (rows, tokens, self.kv_heads, self.head_dim)
        return AttentionCache(like.new_zeros(shape), like.new_zeros(shape))

    def read(self, x_BSD: Tensor, cache: AttentionCache, reading: Reading) -> tuple[Tensor, None]:
        return self._read(x_BSD, cache, reading.before_B), None

    def decode(self, x_BD: Tensor, cache: AttentionCache, before_B: Tensor) -> Tensor:
        return self._read(x_BD[:, None], cache, before_B)[:, 0]

    def _read(self, x_BSD: Tensor, cache: AttentionCache, before_B: Tensor) -> Tensor:
        q_BSHP, k_BSGP, v_BSGP = self._heads(x_BSD)
        cache.write(k_BSGP, v_BSGP, before_B)
        o_BSHP = attention_read(q_BSHP, cache.k_BTGP, cache.v_BTGP, before_B)
        return self.o_proj(o_BSHP.flatten(-2))
