"""One layer of the stack: x + mixer(norm(x)), with one mixer per layer; and stacks of layers.

Shapes: B batch, S sequence, D hidden.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.attention import Attention
from nemo_hybrid.model.cache import After, Caches, LayerCache, Reading, reading
from nemo_hybrid.model.latent_moe import Dispatcher, LatentMoE
from nemo_hybrid.model.mamba2 import Mamba2
from nemo_hybrid.model.mlp import MLP
from nemo_hybrid.model.norm import RMSNorm
from nemo_hybrid.model.router import RoutingStats
from nemo_hybrid.model.sequence import Sequences
from nemo_kernels.documents import Packing, Tile

MIXERS: dict[str, Callable[[ModelConfig, Dispatcher, Sequences], nn.Module]] = {
    "M": lambda cfg, _, sequence: Mamba2(cfg, sequence),
    "E": lambda cfg, dispatcher, _: LatentMoE(cfg, dispatcher),
    "*": lambda cfg, _, sequence: Attention(cfg, sequence),
    "-": lambda cfg, *_: MLP(cfg.hidden_size, cfg.intermediate_size),
}
"""By pattern letter (see ``nemo_hybrid.config.model.LAYER_LETTERS``). A mixer has

* ``forward(h_BSD, documents)`` for training: y_BSD, or with it the statistics of its router,
* ``new_cache(rows, tokens, like)``: what it remembers of texts, or None,
* ``read(h_BSD, cache, reading)``: y_BSD of tokens that follow others, and what `LayerCache.commit`
  is to be given for them, or None,
* ``decode(h_BD, cache, before_B)``: y_BD of one more token per row, which counts at once.
"""


class Layer(nn.Module):
    """``letter`` names the mixer."""

    mixer: Any  # see MIXERS

    def __init__(
        self, letter: str, cfg: ModelConfig, dispatcher: Dispatcher, sequence: Sequences
    ) -> None:
        super().__init__()
        self.letter = letter
        self.norm = RMSNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.mixer = MIXERS[letter](cfg, dispatcher, sequence)

    def forward(
        self, x_BSD: Tensor, documents: Packing | Tile
    ) -> tuple[Tensor, RoutingStats | None]:
        """Training: the new residual stream, and routing statistics of a MoE layer."""
        y_BSD = self.mixer(self.norm(x_BSD), documents)
        y_BSD, stats = y_BSD if isinstance(y_BSD, tuple) else (y_BSD, None)
        return x_BSD + y_BSD, stats

    def read(self, x_BSD: Tensor, cache: LayerCache | None, reading: Reading) -> tuple[Tensor, Any]:
        """Tokens that follow others, and what the cache is to be given to have them count."""
        y_BSD, after = self.mixer.read(self.norm(x_BSD), cache, reading)
        return x_BSD + y_BSD, after

    def decode(self, x_BD: Tensor, cache: LayerCache | None, before_B: Tensor) -> Tensor:
        """One token per row, which counts at once."""
        return x_BD + self.mixer.decode(self.norm(x_BD), cache, before_B)


Run = Callable[[Layer, Tensor, Packing | Tile], tuple[Tensor, RoutingStats | None]]


class Layers(nn.ModuleList):
    """The layers of a pattern, in order. ``run`` is how training calls each of them, to be
    replaced from outside (see ``recompute``)."""

    def __init__(
        self, pattern: str, cfg: ModelConfig, dispatcher: Dispatcher, sequence: Sequences
    ) -> None:
        super().__init__(Layer(letter, cfg, dispatcher, sequence) for letter in pattern)
        self.run: Run = Layer.__call__

    def __iter__(self) -> Iterator[Layer]:
        return cast(Iterator[Layer], super().__iter__())

    def forward(
        self, x_BSD: Tensor, documents: Packing, told: Mapping[int, Tile] = MappingProxyType({})
    ) -> tuple[Tensor, dict[int, RoutingStats]]:
        """Training: the new residual stream, and routing statistics of the MoE layers by number.
        ``told``: what some are told, by number, in place of the documents."""
        stats = {}
        for i, layer in enumerate(self):
            x_BSD, routed = self.run(layer, x_BSD, told.get(i, documents))
            if routed is not None:
                stats[i] = routed
        return x_BSD, stats

    def new_caches(self, rows: int, tokens: int, like: Tensor) -> Caches:
        """Caches of rows that have read nothing, with room for so many tokens in each, in the dtype
        and on the device of ``like``."""
        lengths_B = torch.zeros(rows, dtype=torch.int64, device=like.device)
        return Caches(lengths_B, [layer.mixer.new_cache(rows, tokens, like) for layer in self])

    def read(
        self, x_BSD: Tensor, counts_B: Tensor | None, caches: Caches, revisable: bool = False
    ) -> tuple[Tensor, After]:
        """The first ``counts_B`` of each row's S tokens, which follow what the caches hold; None:
        all of them."""
        now, states = reading(counts_B, x_BSD.shape[1], caches, revisable), []
        for layer, cache in zip(self, caches.layers, strict=True):
            x_BSD, state = layer.read(x_BSD, cache, now)
            states.append(state)
        return x_BSD, After(now.counts_B, x_BSD.shape[1], states)

    def revise(self, after: After, counts_B: Tensor, caches: Caches) -> After:
        """What `commit` needs where other numbers of the tokens count than were read."""
        now = reading(counts_B, after.tokens, caches)
        states = [
            None if state is None else layer.mixer.revise(state, cache, now)
            for layer, state, cache in zip(self, after.states, caches.layers, strict=True)
        ]
        return After(counts_B, after.tokens, states)

    def decode(self, x_BD: Tensor, caches: Caches) -> Tensor:
        """One token per row, which counts at once."""
        for layer, cache in zip(self, caches.layers, strict=True):
            x_BD = layer.decode(x_BD, cache, caches.lengths_B)
        caches.lengths_B += 1
        return x_BD
