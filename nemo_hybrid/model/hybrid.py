"""The whole model: embedding, a stack of hybrid layers, head, and multi-token prediction.

Shapes: B batch, S sequence, D hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.cache import After, Caches, keep_experts
from nemo_hybrid.model.init import Embedding, Head, initialize
from nemo_hybrid.model.latent_moe import Dispatcher, LocalDispatcher
from nemo_hybrid.model.layer import Layers
from nemo_hybrid.model.mtp import MTPBlock, shift_left
from nemo_hybrid.model.norm import RMSNorm
from nemo_hybrid.model.router import RoutingStats
from nemo_hybrid.model.sequence import Sequences, WholeSequences, whole
from nemo_kernels.documents import Documents, Packing, Tile
from nemo_kernels.products import fp32_product

Stats = dict[str, list[RoutingStats]]
"""Routing statistics by layer name, such as ``backbone.layers.1``: one for each time it ran."""


def tokens_ahead(ids_BS: Tensor, depths: int, documents: Documents | None) -> Tensor:
    """Ids of the tokens that each depth reads beside its own, [D, B, S], of whole rows."""
    seq_idx_BS = None if documents is None else documents.seq_idx_BS
    ahead = [shift_left(ids_BS, depth, seq_idx_BS) for depth in range(1, depths + 1)]
    return torch.stack(ahead) if ahead else ids_BS.new_empty(0, *ids_BS.shape)


@dataclass
class HybridOutput:
    """``logits`` [B, S, V]; ``mtp_logits`` one [B, S, V] per depth, when asked for.

    Depth k at position t predicts token t + 1 + k; its last k positions hold no prediction.
    """

    logits: Tensor
    mtp_logits: list[Tensor] = field(default_factory=list)


class Backbone(nn.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, cfg: ModelConfig, dispatcher: Dispatcher, sequence: Sequences) -> None:
        super().__init__()
        self.embeddings = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = Layers(cfg.pattern, cfg, dispatcher, sequence)
        self.norm_f = RMSNorm(cfg.hidden_size, cfg.layer_norm_epsilon)


class HybridLM(nn.Module):
    """Hybrid Mamba-2 / attention language model with LatentMoE layers and MTP heads. What users
    import, ``nemo_hybrid.HybridLM``, can also be loaded and saved (see ``hub``).

    ``dispatcher`` brings tokens to experts (all local by default) and says which experts this
    process owns; ``sequence`` calls the ops that mix tokens (all of a row are here by default).
    Weights depend on ``seed`` only, not on the layout; on the meta device none are
    drawn.
    """

    def __init__(
        self,
        config: HybridConfig,
        *,
        dispatcher: Dispatcher | None = None,
        sequence: Sequences | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        config.validate()
        self.config = config
        dispatcher = dispatcher or LocalDispatcher(config.n_routed_experts)
        self.owned_experts = dispatcher.owned
        self.sequence = sequence = sequence or WholeSequences()
        self.backbone = Backbone(config, dispatcher, sequence)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MTPBlock(config, dispatcher, sequence) if config.mtp_num_depths else None
        if not self.lm_head.weight.is_meta:
            initialize(self, config, self.owned_experts, seed)

    def forward(self, input_ids: Tensor, mtp: bool = False) -> HybridOutput:
        """Logits of ``input_ids`` [B, S], one document per row."""
        h_BSD, _ = self.forward_hidden(input_ids)
        output = HybridOutput(self.lm_head(h_BSD))
        if mtp:
            depths, _ = self.forward_mtp(h_BSD, input_ids)
            output.mtp_logits = [self.lm_head(d_BSD) for d_BSD in depths]
        return output

    def forward_hidden(
        self, ids_BS: Tensor, documents: Packing = None, experts_BSLK: Tensor | None = None
    ) -> tuple[Tensor, Stats]:
        """Hidden states [B, S, D] after the final norm, and routing statistics.

        ``documents``: those of packed rows, or what is known of parts of rows; None: one document
        per row. ``experts_BSLK``: those that tokens go to in the L MoE layers, see `Tile`.
        """
        told: dict[int, Tile] = {}
        if experts_BSLK is not None:
            real_BS = None if documents is None else documents.real_BS
            given = [Tile(real_BS, experts_BSK) for experts_BSK in experts_BSLK.unbind(2)]
            told = dict(zip(self._moe_layers(), given, strict=True))
        x_BSD, routed = self.backbone.layers(self.backbone.embeddings(ids_BS), documents, told)
        stats = {f"backbone.layers.{i}": [layer] for i, layer in routed.items()}
        return self.backbone.norm_f(x_BSD), stats

    def forward_mtp(
        self,
        h_BSD: Tensor,
        ids_BS: Tensor,
        documents: Packing = None,
        depths: int | None = None,
        chosen: Callable[[Sequence[Tensor]], Tensor] = itemgetter(-1),
        detached: bool = False,
        ahead_DBS: Tensor | None = None,
    ) -> tuple[list[Tensor], Stats]:
        """Hidden states of so many ``depths`` (None: as many as the model is trained with), from
        the backbone's final hidden states. ``chosen``: what a depth reads of those before it, the
        backbone's first. ``detached``: gradients reach the block alone.

        ``ahead_DBS``: ids of the tokens that the depths read, where rows are divided; None: found
        among ``ids_BS``.
        """
        assert self.mtp is not None, "the model has no multi-token-prediction block"
        depths = depths or self.config.mtp_num_depths
        if ahead_DBS is None:
            ahead_DBS = tokens_ahead(ids_BS, depths, whole(documents))
        states, stats = [h_BSD.detach() if detached else h_BSD], Stats()
        wide = self.mtp.wide() if depths > 1 else {}
        for ahead_BS in ahead_DBS:
            e_BSD = self.backbone.embeddings(ahead_BS)
            if detached:
                e_BSD = e_BSD.detach()
            h_BSD, routed = functional_call(self.mtp, wide, (chosen(states), e_BSD, documents))
            states.append(h_BSD)
            for i, layer in routed.items():
                stats.setdefault(f"mtp.layers.{i}", []).append(layer)
        return states[1:], stats

    @torch.no_grad()
    def logits(self, h: Tensor) -> Tensor:
        """Of hidden states [.., D]: fp32 [.., V], which tokens are to be drawn from."""
        return fp32_product(h.flatten(0, -2), self.lm_head.weight.t()).unflatten(0, h.shape[:-1])

    def _moe_layers(self) -> list[int]:
        return [i for i, letter in enumerate(self.config.pattern) if letter == "E"]

    def new_caches(
        self, rows: int, tokens: int, mtp: bool = False, experts: bool = False
    ) -> Caches:
        """Caches with room for so many tokens in each row; also for the MTP block, and for the
        experts that tokens go to, if asked for."""
        like = self.backbone.embeddings.weight
        caches = self.backbone.layers.new_caches(rows, tokens, like)
        if experts:
            keep_experts(caches, self._moe_layers(), self.config.num_experts_per_tok, tokens)
        if mtp:
            assert self.mtp is not None, "the model has no multi-token-prediction block"
            caches.mtp = self.mtp.layers.new_caches(rows, tokens, like)
        return caches

    @torch.no_grad()
    def read(
        self, ids_BS: Tensor, counts_B: Tensor | None, caches: Caches, revisable: bool = False
    ) -> tuple[Tensor, After]:
        """Read on: hidden states [B, S, D] after the final norm, and what `commit` needs.

        The first ``counts_B`` tokens of each row follow what the caches hold; ids behind them, and
        hidden states there, mean nothing. None: all tokens do, and no layer has to wait for a GPU
        to know how many they are. The caches need room for all S. The results are those of
        `forward_hidden` over the whole text, however it is divided, up to rounding. With
        ``revisable`` the inputs of all states are kept, so that `revise` can take tokens back.
        """
        x_BSD = self.backbone.embeddings(ids_BS)
        x_BSD, after = self.backbone.layers.read(x_BSD, counts_B, caches, revisable)
        return self.backbone.norm_f(x_BSD), after

    @torch.no_grad()
    def revise(self, after: After, counts_B: Tensor, caches: Caches) -> After:
        """What `commit` needs for fewer tokens than a `read` before it was given, without reading
        them again: only the scans run once more."""
        return self.backbone.layers.revise(after, counts_B, caches)

    @torch.no_grad()
    def read_mtp(
        self, h_BSD: Tensor, ids_BS: Tensor, counts_B: Tensor | None, caches: Caches
    ) -> tuple[Tensor, After]:
        """Depth 1 of multi-token prediction over tokens whose ``h_BSD`` `read` gave: its hidden
        states, and what `commit` needs for ``caches.mtp``. ``ids_BS`` are the tokens after them."""
        assert self.mtp is not None, "the model has no multi-token-prediction block"
        assert caches.mtp is not None, "the caches have none for multi-token prediction"
        return self.mtp.read(h_BSD, self.backbone.embeddings(ids_BS), counts_B, caches.mtp)

    @torch.no_grad()
    def decode(self, ids_B: Tensor, caches: Caches) -> Tensor:
        """Read one more token in each row: its hidden state [B, D] after the final norm. It counts
        at once. Nothing waits for a GPU."""
        x_BD = self.backbone.layers.decode(self.backbone.embeddings(ids_B), caches)
        return self.backbone.norm_f(x_BD)
