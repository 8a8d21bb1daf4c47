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
from nemo_hybrid.model.latent_moe import Dispatcher
from nemo_hybrid.model.layer import Layers, Wide, call, under
from nemo_hybrid.model.linear import Linear
from nemo_hybrid.model.norm import RMSNorm
from nemo_hybrid.model.router import RoutingStats
from nemo_kernels.documents import Documents


class MTPBlock(nn.Module):
    """u = eh_proj([enorm(e); hnorm(h)]) -> layers -> final_layernorm, named as the checkpoint does:
    the projections belong to the first layer, the final norm to the last."""

    def __init__(self, cfg: ModelConfig, dispatcher: Dispatcher) -> None:
        super().__init__()
        D, eps = cfg.hidden_size, cfg.layer_norm_epsilon
        self.layers = Layers(cfg.mtp_pattern, cfg, dispatcher)
        first, last = self._ends()
        first.enorm = RMSNorm(D, eps)
        first.hnorm = RMSNorm(D, eps)
        first.eh_proj = Linear(2 * D, D)
        last.final_layernorm = RMSNorm(D, eps)

    def _ends(self) -> tuple[Any, Any]:
        return self.layers[0], self.layers[-1]

    def forward(
        self, h_BSD: Tensor, e_BSD: Tensor, documents: Documents | None, wide: Wide | None = None
    ) -> tuple[Tensor, dict[int, RoutingStats]]:
        """One depth: previous hidden state (after its final norm) and embeddings of tokens t + k.

        Returns the depth's hidden state (after the final norm) and the MoE layers' statistics.
        ``wide``: parameters to use in place of this block's own, by name.
        """
        first, last = self._ends()
        end = f"layers.{len(self.layers) - 1}.final_layernorm."
        e_BSD = call(first.enorm, wide, "layers.0.enorm.", e_BSD)
        h_BSD = call(first.hnorm, wide, "layers.0.hnorm.", h_BSD)
        x_BSD = call(first.eh_proj, wide, "layers.0.eh_proj.", torch.cat([e_BSD, h_BSD], dim=-1))
        collected = {}
        for i, layer in enumerate(self.layers):
            own = None if wide is None else under(wide, f"layers.{i}.")
            x_BSD, stats = layer(x_BSD, documents, own)
            if stats is not None:
                collected[i] = stats
        return call(last.final_layernorm, wide, end, x_BSD), collected

    def wide(self) -> Wide | None:
        """fp32 copies of the block's trained parameters, with which the gradients of several depths
        are summed in fp32 and rounded once; None where nothing would be rounded."""
        parameters = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if not torch.is_grad_enabled() or all(p.dtype.itemsize > 2 for p in parameters.values()):
            return None
        return {name: p.float() for name, p in parameters.items()}


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
