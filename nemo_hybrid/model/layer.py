"""One layer of the stack: x + mixer(norm(x)), with one mixer per layer; and stacks of layers.

Shapes: B batch, S sequence, D hidden.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.attention import Attention
from nemo_hybrid.model.cache import After, Caches, LayerCache, MambaCache, Reading, reading
from nemo_hybrid.model.latent_moe import Dispatcher, LatentMoE
from nemo_hybrid.model.mamba2 import Mamba2
from nemo_hybrid.model.mlp import MLP
from nemo_hybrid.model.norm import RMSNorm
from nemo_hybrid.model.router import RoutingStats
from nemo_kernels.documents import Documents


def build_mixer(letter: str, cfg: ModelConfig, dispatcher: Dispatcher) -> nn.Module:
    if letter == "M":
        return Mamba2(cfg)
    if letter == "*":
        return Attention(cfg)
    if letter == "E":
        return LatentMoE(cfg, dispatcher)
    return MLP(cfg.hidden_size, cfg.intermediate_size)


class Layer(nn.Module):
    """``letter`` names the mixer: M, E, * or - (see ``nemo_hybrid.config.model.LAYER_LETTERS``)."""

    mixer: Any  # the four mixers share no more than being modules

    def __init__(self, letter: str, cfg: ModelConfig, dispatcher: Dispatcher) -> None:
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

    def read(
        self, x_BSD: Tensor, cache: LayerCache, reading: Reading
    ) -> tuple[Tensor, MambaCache | None]:
        """Tokens that follow others, and what a Mamba cache is to hold after them."""
        h_BSD, after = self.norm(x_BSD), None
        if self.letter == "M":
            y_BSD, after = self.mixer.read(h_BSD, cache, reading)
        elif self.letter == "*":
            y_BSD = self.mixer.read(h_BSD, cache, reading.before_B)
        elif self.letter == "E":
            y_BSD = self.mixer.read(h_BSD, reading)
        else:
            y_BSD = self.mixer(h_BSD)
        return x_BSD + y_BSD, after

    def decode(self, x_BD: Tensor, cache: LayerCache, before_B: Tensor) -> Tensor:
        """One token per row; a Mamba cache moves on."""
        h_BD = self.norm(x_BD)
        if self.letter == "M":
            return x_BD + self.mixer.decode(h_BD, cache)
        if self.letter == "*":
            return x_BD + self.mixer.decode(h_BD, cache, before_B)
        if self.letter == "E":
            return x_BD + self.mixer.decode(h_BD)
        return x_BD + self.mixer(h_BD)


Run = Callable[[Layer, Tensor, Documents | None], tuple[Tensor, RoutingStats | None]]


class Layers(nn.ModuleList):
    """The layers of a pattern, in order. ``run`` is how training calls each of them, to be
    replaced from outside (see ``recompute``)."""

    def __init__(self, pattern: str, cfg: ModelConfig, dispatcher: Dispatcher) -> None:
        super().__init__(Layer(letter, cfg, dispatcher) for letter in pattern)
        self.run: Run = Layer.__call__

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

    def read(self, x_BSD: Tensor, counts_B: Tensor, caches: Caches) -> tuple[Tensor, After]:
        """The first ``counts_B`` of each row's S tokens, which follow what the caches hold."""
        now, states = reading(counts_B, x_BSD.shape[1], caches), []
        for layer, cache in zip(self, caches.layers, strict=True):
            x_BSD, state = layer.read(x_BSD, cache, now)
            states.append(state)
        return x_BSD, After(counts_B, states)

    def decode(self, x_BD: Tensor, caches: Caches) -> Tensor:
        """One token per row, which counts at once."""
        for layer, cache in zip(self, caches.layers, strict=True):
            x_BD = layer.decode(x_BD, cache, caches.lengths_B)
        caches.lengths_B += 1
        return x_BD
