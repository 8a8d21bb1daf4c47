"""Activations that the backward pass computes again instead of finding them kept."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from nemo_hybrid.model.latent_moe import Experts
from nemo_hybrid.model.layer import Layer, Layers
from nemo_hybrid.model.router import RoutingStats
from nemo_kernels.documents import Packing


def recompute_layers(model: nn.Module, letters: str) -> None:
    """Have layers of these pattern letters keep their inputs alone, in the backbone and in the MTP
    block; e: have experts not keep their inner activations."""
    for module in model.modules():
        if isinstance(module, Layers):
            module.run = partial(_run, letters)
        elif isinstance(module, Experts):
            module.recompute = "e" in letters


def _run(
    letters: str, layer: Layer, x_BSD: Tensor, documents: Packing
) -> tuple[Tensor, RoutingStats | None]:
    if layer.letter not in letters or not torch.is_grad_enabled():
        return layer(x_BSD, documents)
    # Where others stand in for the layer's parameters, they do so in the backward pass as well.
    parameters = dict(layer.named_parameters())
    return checkpoint(
        functional_call,
        layer,
        parameters,
        (x_BSD, documents),
        use_reentrant=False,
        preserve_rng_state=False,
    )
