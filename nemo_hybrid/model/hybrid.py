"""The whole model: embedding, a stack of hybrid layers, head, and multi-token prediction.

Shapes: B batch, S sequence, D hidden, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.init import initialize
from nemo_hybrid.model.latent_moe import Dispatcher, Experts, LocalDispatcher
from nemo_hybrid.model.layer import Layer, LayerCache, Layers
from nemo_hybrid.model.mtp import MTPBlock, shift_left
from nemo_hybrid.model.norm import RMSNorm
from nemo_hybrid.model.router import RoutingStats
from nemo_kernels.documents import Documents

Stats = dict[str, RoutingStats]
"""Routing statistics by layer name, such as ``backbone.layers.1``."""


@dataclass
class HybridOutput:
    """``logits`` [B, S, V]; ``mtp_logits`` one [B, S, V] per depth, when asked for.

    Depth k at position t predicts token t + 1 + k; its last k positions hold no prediction.
    """

    logits: Tensor
    mtp_logits: list[Tensor] = field(default_factory=list)


class Backbone(nn.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, cfg: ModelConfig, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = Layers(cfg.pattern, cfg, dispatcher)
        self.norm_f = RMSNorm(cfg.hidden_size, cfg.layer_norm_epsilon)


class HybridLM(nn.Module):
    """Hybrid Mamba-2 / attention language model with LatentMoE layers and MTP heads.

    ``dispatcher`` brings tokens to experts (all local by default) and says which experts this
    process owns. Weights depend on ``seed`` only, not on the layout; on the meta device none are
    drawn. ``recompute`` names the layer letters whose activations are recomputed in backward,
    in the backbone and in the MTP block; e: the experts' inner activations alone.
    """

    def __init__(
        self,
        config: HybridConfig,
        *,
        dispatcher: Dispatcher | None = None,
        seed: int = 0,
        recompute: str = "",
    ) -> None:
        super().__init__()
        config.validate()
        self.config = config
        dispatcher = dispatcher or LocalDispatcher(config.n_routed_experts)
        self.owned_experts = dispatcher.owned
        self.backbone = Backbone(config, dispatcher)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MTPBlock(config, dispatcher) if config.mtp_num_depths else None
        for module in self.modules():
            if isinstance(module, Layer):
                module.recompute = module.letter in recompute
            elif isinstance(module, Experts):
                module.recompute = "e" in recompute
        if not self.lm_head.weight.is_meta:
            initialize(self, config, self.owned_experts, seed)

    @classmethod
    def from_hf(cls, path: str, dtype: torch.dtype | None = None) -> "HybridLM":
        """Load a local directory (run, checkpoint or Hugging Face), every tensor accounted for.

        ``dtype`` None: bf16 or fp32, whichever rounds nothing. The model is in training mode, which
        changes none of its results. Raises UserError.
        """
        from nemo_hybrid.checkpoint.load import load_model

        return load_model(path, dtype)

    def save_hf(self, path: str, dtypes: Literal["default", "source"] = "default") -> None:
        """Write a Hugging Face directory: config.json and safetensors, one key per expert.

        ``dtypes`` "source", after `from_hf`: the very files that were read, in their dtypes; else
        the fp32 list is written in fp32. Raises UserError when path exists and is not empty.
        """
        from nemo_hybrid.checkpoint.load import save_model

        save_model(self, path, dtypes)

    def forward(self, input_ids: Tensor, mtp: bool = False) -> HybridOutput:
        """Logits of ``input_ids`` [B, S], one document per row."""
        h_BSD, _ = self.forward_hidden(input_ids)
        output = HybridOutput(self.lm_head(h_BSD))
        if mtp:
            depths, _ = self.forward_mtp(h_BSD, input_ids)
            output.mtp_logits = [self.lm_head(d_BSD) for d_BSD in depths]
        return output

    def forward_hidden(
        self, ids_BS: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, Stats]:
        """Hidden states [B, S, D] after the final norm, and routing statistics.

        ``documents``: those of packed rows; None: one document per row.
        """
        stats: Stats = {}
        x_BSD = self.backbone.embeddings(ids_BS)
        for i, layer in enumerate(self.backbone.layers):
            x_BSD, routed = layer(x_BSD, documents)
            if routed is not None:
                stats[f"backbone.layers.{i}"] = routed
        return self.backbone.norm_f(x_BSD), stats

    def forward_mtp(
        self, h_BSD: Tensor, ids_BS: Tensor, documents: Documents | None = None
    ) -> tuple[list[Tensor], Stats]:
        """Hidden states of every depth, from the backbone's final hidden states.

        Statistics are summed over depths, because the depths share one router.
        """
        assert self.mtp is not None, "the model has no multi-token-prediction block"
        seq_idx_BS = None if documents is None else documents.seq_idx_BS
        hidden: list[Tensor] = []
        stats: Stats = {}
        wide = self.mtp.wide() if self.config.mtp_num_depths > 1 else None
        for depth in range(1, self.config.mtp_num_depths + 1):
            e_BSD = self.backbone.embeddings(shift_left(ids_BS, depth, seq_idx_BS))
            h_BSD, collected = self.mtp(h_BSD, e_BSD, documents, wide)
            hidden.append(h_BSD)
            for i, new in collected.items():
                name = f"mtp.layers.{i}"
                old = stats.get(name)
                stats[name] = new if old is None else RoutingStats(*map(torch.add, old, new))
        return hidden, stats

    @torch.no_grad()
    def prefill(self, ids_BS: Tensor) -> tuple[Tensor, list[LayerCache]]:
        """Read a prompt: logits [B, V] of the token after it, and the caches."""
        caches = [layer.new_cache() for layer in self.backbone.layers]
        x_BSD = self.backbone.embeddings(ids_BS)
        for layer, cache in zip(self.backbone.layers, caches, strict=True):
            x_BSD = layer.prefill(x_BSD, cache)
        return self.lm_head(self.backbone.norm_f(x_BSD[:, -1])), caches

    @torch.no_grad()
    def decode(self, ids_B: Tensor, caches: list[LayerCache]) -> Tensor:
        """Read one token per row: logits [B, V] of the next; the caches move on."""
        x_BD = self.backbone.embeddings(ids_B)
        for layer, cache in zip(self.backbone.layers, caches, strict=True):
            x_BD = layer.decode(x_BD, cache)
        return self.lm_head(self.backbone.norm_f(x_BD))
