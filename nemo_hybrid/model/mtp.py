"""Multi-token prediction: one physical block, applied once per depth (DeepSeek-V3 section 2.2,
with the weights shared over depths as Nemotron 3 does).

Depth k = 1..n reads the previous depth's hidden state at position t and the embedding of token
t + k, and predicts token t + 1 + k. Embedding and output head are the backbone's.

Shapes: B batch, S sequence, D hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.cache import After, Caches
from nemo_hybrid.model.latent_moe import Dispatcher
from nemo_hybrid.model.layer import Layers
from nemo_hybrid.model.linear import Linear
from nemo_hybrid.model.norm import RMSNorm
from nemo_hybrid.model.router import RoutingStats
from nemo_hybrid.model.sequence import Sequences
from nemo_kernels.documents import Packing
from nemo_kernels.wide import widened


class MTPBlock(nn.Module):
    """u = eh_proj([enorm(e); hnorm(h)]) -> layers -> final_layernorm, named as the checkpoint does:
    the projections belong to the first layer, the final norm to the last."""

    def __init__(self, cfg: ModelConfig, dispatcher: Dispatcher, sequence: Sequences) -> None:
        super().__init__()
        D, eps = cfg.hidden_size, cfg.layer_norm_epsilon
        self.layers = Layers(cfg.mtp_pattern, cfg, dispatcher, sequence)
        first, last = self._ends()
        first.enorm = RMSNorm(D, eps)
        first.hnorm = RMSNorm(D, eps)
        first.eh_proj = Linear(2 * D, D)
        last.final_layernorm = RMSNorm(D, eps)

    def forward(
        self, h_BSD: Tensor, e_BSD: Tensor, documents: Packing
    ) -> tuple[Tensor, dict[int, RoutingStats]]:
        """One depth: previous hidden state (after its final norm) and embeddings of tokens t + k.

        Returns the depth's hidden state (after the final norm) and the MoE layers' statistics.
        """
        x_BSD, stats = self.layers(self._joined(h_BSD, e_BSD), documents)
        return self._ends()[1].final_layernorm(x_BSD), stats

    def read(
        self, h_BSD: Tensor, e_BSD: Tensor, counts_B: Tensor | None, caches: Caches
    ) -> tuple[Tensor, After]:
        """One depth over tokens that follow what the caches hold, see `HybridLM.read_mtp`."""
        x_BSD, after = self.layers.read(self._joined(h_BSD, e_BSD), counts_B, caches)
        return self._ends()[1].final_layernorm(x_BSD), after

    def _joined(self, h_BSD: Tensor, e_BSD: Tensor) -> Tensor:
        first, _ = self._ends()
        return first.eh_proj(torch.cat([first.enorm(e_BSD), first.hnorm(h_BSD)], dim=-1))

    def _ends(self) -> tuple[Any, Any]:
        return self.layers[0], self.layers[-1]

    def wide(self) -> dict[str, Tensor]:
        """What stands in at several depths for the trained parameters, by name, so that gradients
        are summed in fp32 and rounded once."""
        if not torch.is_grad_enabled():
            return {}
        return {name: widened(p) for name, p in self.named_parameters() if p.requires_grad}


def shift_left(x_BS: Tensor, k: int, seq_idx_BS: Tensor | None, fill: int = 0) -> Tensor:
    """x at position t + k of the same document, ``fill`` where the document ends before that."""
    shifted_BS = torch.full_like(x_BS, fill)
    if k >= x_BS.shape[1]:
        return shifted_BS
    ahead_BS = x_BS[:, k:]
    if seq_idx_BS is not None:
        ahead_BS = torch.where(seq_idx_BS[:, k:] == seq_idx_BS[:, :-k], ahead_BS, fill)
    shifted_BS[:, :-k] = ahead_BS
    return shifted_BS
