"""What decoding remembers: keys and values of attention layers, states of Mamba-2 layers.

Shapes: B batch, S prompt length, T room, G key/value heads, P head dim, C conv channels,
J = conv kernel - 1, H Mamba heads, N state.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


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


@dataclass
class MambaCache:
    """The last inputs of the convolution [B, C, J] and the state of the scan [B, H, P, N], fp32."""

    conv_BCJ: Tensor = field(default_factory=lambda: torch.empty(0))
    ssm_BHPN: Tensor = field(default_factory=lambda: torch.empty(0))
