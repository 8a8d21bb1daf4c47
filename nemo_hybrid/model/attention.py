"""Grouped-query attention without position encoding: order comes from the Mamba-2 layers.

Shapes: B batch, S sequence, D hidden, H query heads, G key/value heads, P head dim, T cache length.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.linear import Linear
from nemo_kernels.attention import attention, attention_step
from nemo_kernels.documents import Documents


@dataclass
class AttentionCache:
    """Keys and values so far; the room doubles when it is full, so appending is O(1) amortised."""

    k_BTGP: Tensor = field(default_factory=lambda: torch.empty(0))
    v_BTGP: Tensor = field(default_factory=lambda: torch.empty(0))
    length: int = 0

    def start(self, k_BSGP: Tensor, v_BSGP: Tensor) -> None:
        self.k_BTGP, self.v_BTGP, self.length = k_BSGP, v_BSGP, k_BSGP.shape[1]

    def append(self, k_BGP: Tensor, v_BGP: Tensor) -> tuple[Tensor, Tensor]:
        """Add one position; return all keys and values [B, length, G, P]."""
        if self.length == self.k_BTGP.shape[1]:
            self.k_BTGP = torch.cat([self.k_BTGP, torch.empty_like(self.k_BTGP)], dim=1)
            self.v_BTGP = torch.cat([self.v_BTGP, torch.empty_like(self.v_BTGP)], dim=1)
        self.k_BTGP[:, self.length] = k_BGP
        self.v_BTGP[:, self.length] = v_BGP
        self.length += 1
        return self.k_BTGP[:, : self.length], self.v_BTGP[:, : self.length]


class Attention(nn.Module):
    """Causal attention; documents of a packed row do not see each other."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        q_size = cfg.num_attention_heads * cfg.head_dim
        kv_size = cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = Linear(cfg.hidden_size, q_size)
        self.k_proj = Linear(cfg.hidden_size, kv_size)
        self.v_proj = Linear(cfg.hidden_size, kv_size)
        self.o_proj = Linear(q_size, cfg.hidden_size)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [.., H, P], k and v [.., G, P] of x [.., D]."""
        split = (*x.shape[:-1], -1, self.head_dim)
        return self.q_proj(x).view(split), self.k_proj(x).view(split), self.v_proj(x).view(split)

    def forward(self, x_BSD: Tensor, documents: Documents | None = None) -> Tensor:
        q_BSHP, k_BSGP, v_BSGP = self._heads(x_BSD)
        o_BSHP = attention(q_BSHP, k_BSGP, v_BSGP, documents)
        return self.o_proj(o_BSHP.flatten(-2))

    def prefill(self, x_BSD: Tensor, cache: AttentionCache) -> Tensor:
        q_BSHP, k_BSGP, v_BSGP = self._heads(x_BSD)
        cache.start(k_BSGP, v_BSGP)
        return self.o_proj(attention(q_BSHP, k_BSGP, v_BSGP).flatten(-2))

    def decode(self, x_BD: Tensor, cache: AttentionCache) -> Tensor:
        q_BHP, k_BGP, v_BGP = self._heads(x_BD)
        k_BTGP, v_BTGP = cache.append(k_BGP, v_BGP)
        return self.o_proj(attention_step(q_BHP, k_BTGP, v_BTGP).flatten(-2))
