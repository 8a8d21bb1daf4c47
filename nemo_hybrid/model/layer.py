"""One layer of the stack: x + mixer(norm(x)), with one mixer per layer; and stacks of layers.

Shapes: B batch, S sequence, D hidden.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from nemo_hybrid.config import Architecture
from nemo_hybrid.model.attention import Attention, AttentionCache
from nemo_hybrid.model.latent_moe import Dispatcher, LatentMoE
from nemo_hybrid.model.mamba2 import Mamba2, MambaCache
from nemo_hybrid.model.mlp import MLP
from nemo_hybrid.model.norm import RMSNorm
from nemo_hybrid.model.router import RoutingStats
from nemo_kernels.documents import Documents

LayerCache = AttentionCache | MambaCache | None


def build_mixer(letter: str, cfg: Architecture, dispatcher: Dispatcher) -> nn.Module:
    if letter == "M":
        return Mamba2(cfg)
    if letter == "*":
        return Attention(cfg)
    if letter == "E":
        return LatentMoE(cfg, dispatcher)
    return MLP(cfg.hidden_size, cfg.intermediate_size)


class Layer(nn.Module):
    """``letter`` names the mixer: M, E, * or - (see ``nemo_hybrid.config.LAYER_LETTERS``)."""

    mixer: Any  # the four mixers share no more than being modules

    def __init__(self, letter: str, cfg: Architecture, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.letter = letter
        self.norm = RMSNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.mixer = build_mixer(letter, cfg, dispatcher)

    def forward(
        self, x_BSD: Tensor, documents: Documents | None
    ) -> tuple[Tensor, RoutingStats | None]:
        """Training: the new residual stream, and routing statistics of a MoE layer."""
        h_BSD = self.norm(x_BSD)
        if self.letter == "E":
            y_BSD, stats = self.mixer(h_BSD, documents)
            return x_BSD + y_BSD, stats
        if self.letter == "-":
            return x_BSD + self.mixer(h_BSD), None
        return x_BSD + self.mixer(h_BSD, documents), None

    def new_cache(self) -> LayerCache:
        return {"M": MambaCache, "*": AttentionCache}.get(self.letter, lambda: None)()

    def prefill(self, x_BSD: Tensor, cache: LayerCache) -> Tensor:
        h_BSD = self.norm(x_BSD)
        if self.letter == "E":
            return x_BSD + self.mixer(h_BSD)[0]
        if self.letter == "-":
            return x_BSD + self.mixer(h_BSD)
        return x_BSD + self.mixer.prefill(h_BSD, cache)

    def decode(self, x_BD: Tensor, cache: LayerCache) -> Tensor:
        h_BD = self.norm(x_BD)
        if self.letter == "E":
            return x_BD + self.mixer.decode(h_BD)
        if self.letter == "-":
            return x_BD + self.mixer(h_BD)
        return x_BD + self.mixer.decode(h_BD, cache)


Run = Callable[[Layer, Tensor, Documents | None], tuple[Tensor, RoutingStats | None]]


def run_plainly(
    layer: Layer, x_BSD: Tensor, documents: Documents | None
) -> tuple[Tensor, RoutingStats | None]:
    return layer(x_BSD, documents)


class Layers(nn.ModuleList):
    """The layers of a pattern, in order. ``run`` is how training calls each of them, to be
    replaced from outside (see ``recompute``)."""

    def __init__(self, pattern: str, cfg: Architecture, dispatcher: Dispatcher) -> None:
        super().__init__(Layer(letter, cfg, dispatcher) for letter in pattern)
        self.run: Run = run_plainly

    def __iter__(self) -> Iterator[Layer]:
        return cast(Iterator[Layer], super().__iter__())

    def forward(
        self, x_BSD: Tensor, documents: Documents | None
    ) -> tuple[Tensor, dict[int, RoutingStats]]:
        """Training: the new residual stream, and routing statistics of the MoE layers by number."""
        stats = {}
        for i, layer in enumerate(self):
            x_BSD, routed = self.run(layer, x_BSD, documents)
            if routed is not None:
                stats[i] = routed
        return x_BSD, stats
