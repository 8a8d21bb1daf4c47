"""One layer of the stack: x + mixer(norm(x)), with one mixer per layer."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.attention import Attention, AttentionCache
from nemo_hybrid.model.latent_moe import Dispatcher, LatentMoE
from nemo_hybrid.model.mamba2 import Mamba2, MambaCache
from nemo_hybrid.model.mlp import MLP
from nemo_hybrid.model.norm import RMSNorm
from nemo_hybrid.model.router import RoutingStats
from nemo_kernels.documents import Documents

LayerCache = AttentionCache | MambaCache | None
Wide = dict[str, Tensor]
"""Parameters by name that stand in for a module's own (see ``linear``)."""


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
        self.recompute = False  # keep only the layer's input for the backward pass
        self.norm = RMSNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.mixer = build_mixer(letter, cfg, dispatcher)

    def forward(
        self, x_BSD: Tensor, documents: Documents | None, wide: Wide | None = None
    ) -> tuple[Tensor, RoutingStats | None]:
        """Training: the new residual stream, and routing statistics of a MoE layer.

        ``wide``: parameters to use in place of this layer's own, by name.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(
                self._compute, x_BSD, documents, wide, use_reentrant=False, preserve_rng_state=False
            )
        return self._compute(x_BSD, documents, wide)

    def _compute(
        self, x_BSD: Tensor, documents: Documents | None, wide: Wide | None
    ) -> tuple[Tensor, RoutingStats | None]:
        h_BSD = call(self.norm, wide, "norm.", x_BSD)
        if self.letter == "E":
            y_BSD, stats = call(self.mixer, wide, "mixer.", h_BSD, documents)
            return x_BSD + y_BSD, stats
        if self.letter == "-":
            return x_BSD + call(self.mixer, wide, "mixer.", h_BSD), None
        return x_BSD + call(self.mixer, wide, "mixer.", h_BSD, documents), None

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


def call(module: nn.Module, wide: Wide | None, prefix: str, *args: Any) -> Any:
    """``module(*args)``, with those parameters of ``wide`` whose names begin with prefix."""
    if wide is None:
        return module(*args)
    return functional_call(module, under(wide, prefix), args)


def under(wide: Wide, prefix: str) -> Wide:
    """Those whose names begin with prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in wide.items() if n.startswith(prefix)}


class Layers(nn.ModuleList):
    """The layers of a pattern, in order."""

    def __init__(self, pattern: str, cfg: ModelConfig, dispatcher: Dispatcher) -> None:
        super().__init__(Layer(letter, cfg, dispatcher) for letter in pattern)

    def __iter__(self) -> Iterator[Layer]:
        return cast(Iterator[Layer], super().__iter__())
