"""LatentMoE (arXiv 2601.18089): routed experts that work in a narrow latent space.

The router and the shared expert see the full hidden width; tokens are dispatched, transformed and
combined in the latent width. Without a latent size this is an ordinary MoE layer.

Shapes: B rows, S sequence, T = B*S tokens, R real ones of them, D hidden, L latent, E experts,
F expert width, K experts per token.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.cache import ExpertsCache, Reading
from nemo_hybrid.model.linear import Adapter, Linear
from nemo_hybrid.model.mlp import MLP
from nemo_hybrid.model.router import Router, RoutingStats, routing_stats
from nemo_kernels.documents import Packing, Tile
from nemo_kernels.moe import LowRank, moe_mlp
from nemo_kernels.moe.function import Experts as ExpertProducts


class Experts(nn.Module):
    """The ``owned`` of ``total`` routed experts, stacked: up [E, F, L] and down [E, L, F]."""

    def __init__(self, owned: range, total: int, size: int, intermediate: int) -> None:
        super().__init__()
        self.owned, self.total = owned, total
        self.up_proj = nn.Parameter(torch.empty(len(owned), intermediate, size))
        self.down_proj = nn.Parameter(torch.empty(len(owned), size, intermediate))
        self.up_proj_lora: Adapter | None = None
        self.down_proj_lora: Adapter | None = None
        self.recompute = False  # the pre-activation in the backward pass
        self.low_precision: ExpertProducts | None = None  # see nemo_hybrid.precision

    def adapted(self) -> "AdaptedExperts":
        """What is to be multiplied. Formats of low precision are those of the sums with adapters,
        which are made anew then, and kept for the backward pass."""
        up, down = self.up_proj_lora, self.down_proj_lora
        if self.low_precision is None and (up or down):
            low_rank = [None if a is None else a.low_rank() for a in (up, down)]
            beside = (low_rank[0], low_rank[1])
            return AdaptedExperts(self.up_proj, self.down_proj, self.recompute, None, beside)
        return AdaptedExperts(
            self.up_proj if up is None else up.added_to(self.up_proj),
            self.down_proj if down is None else down.added_to(self.down_proj),
            self.recompute,
            self.low_precision,
        )


class AdaptedExperts(NamedTuple):
    """Weights of `Experts`, how to calculate, and what adapters add that is not in the weights."""

    up_proj: Tensor  # [E, F, L]
    down_proj: Tensor  # [E, L, F]
    recompute: bool
    low_precision: ExpertProducts | None
    low_rank: tuple[LowRank | None, LowRank | None] | None = None


class Dispatcher(Protocol):
    """Brings tokens to experts and back: [T, L] -> [T, L]. ``owned`` are this process's experts."""

    owned: range

    def __call__(
        self, x_TL: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, experts: AdaptedExperts
    ) -> Tensor: ...


class LocalDispatcher(nn.Module):
    """All experts live in this process."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.owned = range(experts)

    def forward(
        self, x_TL: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, experts: AdaptedExperts
    ) -> Tensor:
        return moe_mlp(x_TL, topk_ids_TK, topk_weights_TK, *experts)


class LatentMoE(nn.Module):
    """x -> fc2_latent_proj(experts(fc1_latent_proj(x))) + shared_experts(x)."""

    def __init__(self, cfg: ModelConfig, dispatcher: Dispatcher) -> None:
        super().__init__()
        D, L = cfg.hidden_size, cfg.expert_size
        self.gate = Router(cfg)
        self.experts = Experts(dispatcher.owned, cfg.n_routed_experts, L, cfg.moe_intermediate_size)
        self.dispatcher = dispatcher
        latent = cfg.moe_latent_size is not None
        self.fc1_latent_proj = Linear(D, L) if latent else None
        self.fc2_latent_proj = Linear(L, D) if latent else None
        shared = cfg.moe_shared_expert_intermediate_size
        self.shared_experts = MLP(D, shared) if shared else None

    def _mix(self, x_TD: Tensor, given_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Output [T, D], expert ids [T, K] and scores [T, E]; ``given_TK``: see `Router`."""
        ids_TK, weights_TK, scores_TE = self.gate(x_TD, given_TK)
        h_TL = x_TD if self.fc1_latent_proj is None else self.fc1_latent_proj(x_TD)
        h_TL = self.dispatcher(h_TL, ids_TK, weights_TK, self.experts.adapted())
        y_TD = h_TL if self.fc2_latent_proj is None else self.fc2_latent_proj(h_TL)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD, ids_TK, scores_TE

    def forward(
        self, x_BSD: Tensor, documents: Packing | Tile = None
    ) -> tuple[Tensor, RoutingStats]:
        given_BSK = documents.experts_BSK if isinstance(documents, Tile) else None
        given_TK = None if given_BSK is None else given_BSK.flatten(0, 1).long()
        y_TD, ids_TK, scores_TE = self._mix(x_BSD.flatten(0, 1), given_TK)
        real_BS = None if documents is None else documents.real_BS
        stats = routing_stats(scores_TE, ids_TK, x_BSD.shape[0], real_BS)
        return y_TD.view_as(x_BSD), stats

    def new_cache(self, rows: int, tokens: int, like: Tensor) -> None:
        """A token needs none but itself (see `keep_experts`)."""

    def read(
        self, x_BSD: Tensor, cache: ExpertsCache | None, reading: Reading
    ) -> tuple[Tensor, None]:
        """What pads a row is not sent to experts, so it does not take part in anything."""
        y_BSD = torch.zeros_like(x_BSD)
        x_RD = x_BSD.flatten(0, 1)[reading.real_R]
        y_BSD.flatten(0, 1)[reading.real_R], ids_RK, _ = self._mix(x_RD)
        if cache is not None:
            ids_BSK = ids_RK.new_zeros(*x_BSD.shape[:2], self.gate.top_k)
            ids_BSK.flatten(0, 1)[reading.real_R] = ids_RK
            cache.write(ids_BSK, reading.before_B)
        return y_BSD, None

    def decode(self, x_BD: Tensor, cache: ExpertsCache | None, before_B: Tensor) -> Tensor:
        y_BD, ids_BK, _ = self._mix(x_BD)
        if cache is not None:
            cache.write(ids_BK[:, None], before_B)
        return y_BD
